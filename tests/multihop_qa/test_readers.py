"""Readers: the public formats as they come, and one clear sentence for what does not fit them."""

import json
import sys
import types

import pytest

from trace_envs.multihop_qa.data import Passage
from trace_envs.multihop_qa.readers import READERS, DataFormatError, load_dataset

HOTPOT = {
    "_id": "h1",
    "question": "Who?",
    "answer": "Ann",
    "type": "bridge",
    "supporting_facts": [["B", 0], ["A", 9], ["B", 1]],
    "context": [["A", ["One.", " Two."]], ["B", ["Three."]], ["B", ["Another B."]]],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": "Who?",
    "answer": "G. Hall",
    "answer_aliases": ["Hall"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "a", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "b", "is_supporting": False},
        {"idx": 2, "title": "C", "paragraph_text": "c", "is_supporting": True},
    ],
    "question_decomposition": [{"paragraph_support_idx": 2}, {"paragraph_support_idx": 0}],
}


def write(path, content, form="list"):
    if form == "list":
        text = json.dumps(content)
    elif form == "lines":
        text = "\n".join(json.dumps(record) for record in content) + "\n"
    else:
        text = content
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "file", "corpus", "questions", "passages"),
    [
        pytest.param(*row, marks=pytest.mark.data)
        for row in (
            ("hotpotqa", "hotpotqa/hotpotqa_train.json", None, 100, 994),
            ("hotpotqa", "hotpotqa/hotpotqa_train.json", "hotpotqa/hotpotqa_train_corpus.json", 100, 994),
            ("hotpotqa", "hotpotqa/hotpotqa_train_200.jsonl", None, 200, 1969),
            ("musique", "musique/musique_train.json", None, 100, 1890),
            ("musique", "musique/musique_train.json", "musique/musique_train_corpus.json", 100, 1890),
            ("2wiki", "2wikimultihopqa/2wikimultihopqa_train_500.json", None, 500, 3112),
            (
                "2wikimultihopqa",
                "2wikimultihopqa/2wikimultihopqa_train_500.json",
                "2wikimultihopqa/2wikimultihopqa_corpus.json",
                500,
                6119,
            ),
        )
    ],
)
def test_real_files(data_dir, name, file, corpus, questions, passages):
    data = load_dataset(name, data_path=data_dir / file, corpus_path=corpus and data_dir / corpus)
    assert (len(data.tasks), len(data.passages)) == (questions, passages)
    titles = {passage.title for passage in data.passages}
    for task in data.tasks:
        assert task.prompt and task.answers and task.hops in (2, 3, 4) and task.supporting
        if "2wiki" not in name or corpus is None:  # that corpus file is of other questions
            assert set(task.supporting) <= titles


@pytest.mark.data
def test_a_pooled_hotpotqa_corpus_is_the_corpus_file(data_dir):
    file = data_dir / "hotpotqa" / "hotpotqa_train.json"
    pooled = load_dataset("hotpotqa", data_path=file)
    read = load_dataset("hotpotqa", data_path=file, corpus_path=file.with_name("hotpotqa_train_corpus.json"))
    assert set(pooled.passages) == set(read.passages)


@pytest.mark.parametrize("form", ["list", "lines"])
def test_hotpotqa(tmp_path, form):
    data = load_dataset("hotpotqa", data_path=write(tmp_path / "q.json", [HOTPOT, {**HOTPOT, "_id": "h2"}], form))
    assert data.passages == (Passage("A", "One. Two."), Passage("B", "Three."), Passage("B", "Another B."))
    task = data.task("h1")
    assert (task.prompt, task.answers, task.supporting, task.hops) == ("Who?", ("Ann",), ("B", "A"), 2)
    assert len(load_dataset("hotpotqa", data_path=tmp_path / "q.json", limit=1).tasks) == 1


def test_one_json_line_and_a_byte_order_mark(tmp_path):
    write(tmp_path / "q.jsonl", "\ufeff" + json.dumps(HOTPOT), "text")
    assert len(load_dataset("hotpotqa", data_path=tmp_path / "q.jsonl").tasks) == 1


def test_columns_of_the_hub(tmp_path):
    record = {
        "id": "h1",
        "question": "Who?",
        "answer": "Ann",
        "supporting_facts": {"title": ["B", "A", "B"], "sent_id": [0, 1, 7]},
        "context": {"title": ["A", "B"], "sentences": [["One.", "Two."], ["Three."]]},
    }
    data = load_dataset("2wiki", data_path=write(tmp_path / "q.json", [record]))
    assert data.passages == (Passage("A", "One. Two."), Passage("B", "Three."))
    assert data.tasks[0].supporting == ("B", "A") and data.tasks[0].hops == 2


def test_musique(tmp_path):
    records = [MUSIQUE, {**MUSIQUE, "answerable": False}, {**MUSIQUE, "question": "Again?"}]
    data = load_dataset("musique", data_path=write(tmp_path / "q.jsonl", records, "lines"))
    assert [task.task_id for task in data.tasks] == ["2hop__1_2", "2hop__1_2#2"]
    task = data.tasks[0]
    assert (task.answers, task.hops, task.kind, task.supporting) == (("G. Hall", "Hall"), 2, "2hop", ("C", "A"))
    assert len(data.passages) == 3


@pytest.mark.parametrize("form", ["list", "lines", "csv"])
def test_bamboogle(tmp_path, form):
    rows = [{"Question": "Who, then?", "Answer": "Ann"}, {"Question": "When?", "Answer": "1920"}]
    if form == "csv":
        path = write(tmp_path / "b.csv", 'Question,Answer\n"Who, then?",Ann\nWhen?,1920\n', "text")
    else:
        path = write(tmp_path / "b.json", rows, form)
    corpus = write(tmp_path / "c.jsonl", [{"title": "A", "text": "x"}, {"contents": '"B"\ny'}], "lines")
    data = load_dataset("bamboogle", data_path=path, corpus_path=corpus)
    assert [(task.task_id, task.answers) for task in data.tasks] == [
        ("bamboogle-1", ("Ann",)),
        ("bamboogle-2", ("1920",)),
    ]
    assert data.passages == (Passage("A", "x"), Passage("B", "y"))
    with pytest.raises(ValueError, match="pass corpus_path"):
        load_dataset("bamboogle", data_path=path)


def test_duplicate_ids_get_a_suffix(tmp_path):
    data = load_dataset("hotpotqa", data_path=write(tmp_path / "q.json", [HOTPOT, {**HOTPOT, "_id": "h1#2"}, HOTPOT]))
    assert [task.task_id for task in data.tasks] == ["h1", "h1#2", "h1#3"]


def without(record, field):
    return {key: value for key, value in record.items() if key != field}


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("hotpotqa", without(HOTPOT, "question"), "record 2, field 'question': expected a non-empty string, the field"),
        ("hotpotqa", {**HOTPOT, "answer": None}, "record 2, field 'answer': expected a non-empty string, got None"),
        ("hotpotqa", without(HOTPOT, "_id"), "record 2, field '_id'"),
        ("hotpotqa", without(HOTPOT, "context"), "record 2, field 'context'"),
        (
            "hotpotqa",
            {**HOTPOT, "context": [["A", "text"]]},
            r"field 'context\[0\]\[1\]': expected a list of sentences",
        ),
        ("hotpotqa", {**HOTPOT, "context": [["A"]]}, r"field 'context\[0\]'"),
        ("hotpotqa", {**HOTPOT, "context": {"title": ["A"], "sentences": []}}, "of equal lengths"),
        ("hotpotqa", {**HOTPOT, "supporting_facts": ["A"]}, r"field 'supporting_facts\[0\]'"),
        ("hotpotqa", {**HOTPOT, "supporting_facts": [[3, "A"]]}, r"field 'supporting_facts\[0\]': expected a title"),
        ("hotpotqa", ["no object"], "record 2: expected a JSON object"),
        ("musique", without(MUSIQUE, "paragraphs"), "record 2, field 'paragraphs'"),
        ("musique", {**MUSIQUE, "paragraphs": [{"title": "A"}]}, r"field 'paragraphs\[0\].paragraph_text'"),
        ("musique", {**MUSIQUE, "answer_aliases": "Hall"}, "field 'answer_aliases': expected a list"),
        ("musique", {**MUSIQUE, "question_decomposition": 3}, "field 'question_decomposition'"),
    ],
)
def test_malformed_records_name_file_record_and_field(tmp_path, name, record, message):
    good = HOTPOT if name == "hotpotqa" else MUSIQUE
    with pytest.raises(DataFormatError, match=message) as caught:
        load_dataset(name, data_path=write(tmp_path / "questions.json", [good, record]))
    assert "questions.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("[]", "holds no record"),
        (json.dumps([HOTPOT])[:-30], "not valid JSON.*cut short"),
        (json.dumps(HOTPOT) + "\n" + json.dumps(HOTPOT)[:50], r"record 2 \(line 2\).*cut short"),
        ("plain words", "record 1"),
    ],
)
def test_broken_files(tmp_path, text, message):
    with pytest.raises(DataFormatError, match=message):
        load_dataset("hotpotqa", data_path=write(tmp_path / "q.json", text, "text"))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "q.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataFormatError, match="not UTF-8"):
        load_dataset("hotpotqa", data_path=tmp_path / "q.json")


def test_a_torn_csv_row(tmp_path):
    path = write(tmp_path / "b.csv", "Question,Answer\nWho?\n", "text")
    with pytest.raises(DataFormatError, match=r"b\.csv, record 1"):
        load_dataset("bamboogle", data_path=path, corpus_path=write(tmp_path / "c.json", [{"title": "A", "text": "x"}]))


@pytest.mark.parametrize(
    ("content", "message"),
    [([{"title": "A"}], "record 1, field 'text'"), ([{"text": "A"}], "field 'title'"), ([], "no passage")],
)
def test_malformed_corpora(tmp_path, content, message):
    path = write(tmp_path / "q.json", [HOTPOT])
    with pytest.raises(DataFormatError, match=message) as caught:
        load_dataset("hotpotqa", data_path=path, corpus_path=write(tmp_path / "corpus.json", content))
    assert "corpus.json" in str(caught.value)


def test_missing_files_name_the_argument(tmp_path):
    with pytest.raises(FileNotFoundError, match="data_path: there is no file"):
        load_dataset("hotpotqa", data_path=tmp_path / "none.json")
    path = write(tmp_path / "q.json", [HOTPOT])
    with pytest.raises(FileNotFoundError, match=r"corpus_path: .*directory"):
        load_dataset("hotpotqa", data_path=path, corpus_path=tmp_path)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="unknown dataset 'squad'; known: hotpotqa, 2wikimultihopqa"):
        load_dataset("squad")
    with pytest.raises(ValueError, match="limit"):
        load_dataset("hotpotqa", limit=0)


def test_questions_without_contexts_need_a_corpus(tmp_path):
    path = write(tmp_path / "q.json", [{**HOTPOT, "context": []}])
    with pytest.raises(ValueError, match="pass corpus_path"):
        load_dataset("hotpotqa", data_path=path)


def hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


def test_the_hub_is_asked_by_name_and_split(monkeypatch):
    asked = []

    def load(repository, configuration, *, split):
        asked.append((repository, configuration, split))
        return [HOTPOT]

    hub(monkeypatch, load)
    assert len(load_dataset("hotpotqa", split="dev").tasks) == 1
    assert asked == [("hotpotqa/hotpot_qa", "distractor", "validation")]
    assert all("/" in source.hub[0] for source in READERS.values())


def test_an_unreachable_hub_and_a_missing_package(monkeypatch):
    def load(*args, **kwargs):
        raise OSError("no route")

    hub(monkeypatch, load)
    with pytest.raises(ConnectionError, match=r"dgslibisey/MuSiQue.*no route.*pass data_path"):
        load_dataset("musique")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"trace-envs\[datasets\]"):
        load_dataset("musique")
