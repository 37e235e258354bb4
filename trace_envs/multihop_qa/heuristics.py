"""A scripted agent without privileges: what searching with BM25 and a few rules of thumb can answer.

Invariant: the next action is a function of the question and of the turns so far, which is all that a model would see.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from trace_envs.state import FinalAnswer, ToolCall, Turn

MAX_SEARCHES = 3

_PASSAGE = re.compile(r"^\[\d+\] (.+?): (.*)$")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[\"(\[]?\w)")
_WORD = re.compile(r"\w+")
_NAME_WORD = r"[A-ZÀ-ÖØ-ÞŁŚŽČ][\w'’.&-]*"
_SPAN = re.compile(rf"{_NAME_WORD}(?:\s+(?:(?:of|the|de|la|von|van|and|du|in)\s+){{0,2}}{_NAME_WORD})*")
_QUOTED = re.compile(r"[\"“]([^\"”]{2,80})[\"”]")
_DATE = re.compile(r"\b(?:\d{1,2} [A-Z][a-z]+,? \d{4}|[A-Z][a-z]+ \d{1,2}, \d{4})\b")
_YEAR = re.compile(r"\b(?:1\d{3}|20\d{2})\b")
_NUMBER = re.compile(r"\b\d[\d,]*(?:\.\d+)?\b")
_YES_NO = re.compile(r"^(?:is|are|was|were|do|does|did|has|have|had|can|could|will)\b", re.I)
_CHOICE = re.compile(
    r"(?:[,:?]|\b(?:between|first|older|younger|earlier|later|in|by|is|was)\b)\s*([^,:?]+?),? or ([^?]+)\?"
)
_LEAST = re.compile(r"\b(?:first|older|oldest|earlier|earliest|longer ago|before)\b", re.I)
_MOST = re.compile(r"\b(?:last|younger|youngest|later|latest|more recent|more recently|newer)\b", re.I)
_COMMON = frozenset(
    _WORD.findall(
        "a an and are as at be by did do does for from had has have he her his how in is it its of on or she that the "
        "their they this to was were what when where which who whom whose why will with both same name named also been "
        "after before into"
    )
)
_OPENERS = frozenset(
    _WORD.findall("The A An In On It He She His Her They This These That At As For From After During And But")
)
_CALENDAR = frozenset(
    _WORD.findall(
        "January February March April May June July August September October November December "
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
    )
)

Passages = list[tuple[str, str]]


def bm25_action(question: str, turns: Sequence[Turn]) -> tuple[str, ToolCall | FinalAnswer]:
    """Returns the next thought and action of the scripted agent.

    It searches for the question, then at most twice for a name that the question or the passages mention, and ends with an
    answer of the type that the question asks for.

    Args:
        question: The question as asked.
        turns: The turns so far, oldest first.

    Returns:
        The thought and the search call or final answer.
    """
    tried = [str(turn.action.arguments.get("query", "")) for turn in turns if isinstance(turn.action, ToolCall)]
    passages = _passages(turns)
    if len(turns) < MAX_SEARCHES:
        if not tried:
            # The environment refuses longer queries.
            return "I search for the question.", ToolCall("search", {"query": question[:500]})
        query = _follow_up(question, passages, tried)
        if query is not None:
            return f"I look up {query}.", ToolCall("search", {"query": query[:500]})
    return "I answer from what was found.", FinalAnswer(_answer(question, passages))


def _passages(turns: Sequence[Turn]) -> Passages:
    """Returns the distinct passages shown so far, in order."""
    found: dict[tuple[str, str], None] = {}
    for turn in turns:
        if turn.error:
            continue
        for line in turn.observation.split("\n"):
            if match := _PASSAGE.match(line):
                found[match[1], match[2]] = None
    return list(found)


def _follow_up(question: str, passages: Passages, tried: Sequence[str]) -> str | None:
    """Returns a name to look up: one of the question that no title bears, else the best supported of the passages."""
    done = {_plain(query) for query in tried}
    titles = {_plain(title) for title, _ in passages}
    for name in _names(question, of_question=True):
        plain = _plain(name)
        if plain not in done and len(plain) > 3 and not any(plain in title or title in plain for title in titles):
            return name
    for name in _ranked_names(question, passages):
        if _plain(name) not in done and _plain(name) not in titles:
            return name
    return next((title for title, _ in passages if _plain(title) not in done), None)


def _answer(question: str, passages: Passages) -> str:
    low = question.lower()
    choice = _choices(question)
    if _YES_NO.match(question.strip()) and choice is None:
        return _yes_no(question, passages)
    if choice is not None:
        return _choose(question, choice, passages)
    patterns: tuple[re.Pattern[str], ...] = ()
    if re.search(r"\bhow (?:many|much|old|long|tall|far|large|high)\b|\bpopulation\b|\bwhat number\b", low):
        patterns = (_NUMBER,)
    elif re.search(r"\b(?:what|which) year\b|\byear\b", low):
        patterns = (_YEAR,)
    elif re.search(r"\bwhen\b|\bdate\b|\bwhat day\b", low):
        patterns = (_DATE, _YEAR)
    for pattern in patterns:
        if found := _best_match(pattern, question, passages):
            return found
    if ranked := _ranked_names(question, passages):
        return ranked[0]
    return passages[0][0] if passages else "unknown"


def _choices(question: str) -> tuple[str, str] | None:
    """Returns the two things that a question offers ("..., X or Y?")."""
    match = _CHOICE.search(question)
    if match is None:
        return None
    left, right = match[1].strip(" \"'“”"), match[2].strip(" \"'“”")
    if len(left.split()) > 8:
        # Only the end of a long left part is the name.
        names = _SPAN.findall(left)
        left = names[-1] if names else left
    return (left, right) if left and right else None


def _choose(question: str, choice: tuple[str, str], passages: Passages) -> str:
    """Returns one of two: by year where the question ranks them in time, else the one whose passage says more of it."""
    texts = [_about(name, passages) for name in choice]
    least, most = _LEAST.search(question), _MOST.search(question)
    years = [[int(year) for year in _YEAR.findall(text)] for text in texts]
    if (least or most) and all(years):
        first = [found[0] for found in years]
        return choice[first.index(min(first) if least else max(first))]
    words = _content(question)
    shared = [len(words & _content(text)) for text in texts]
    return choice[int(shared[1] > shared[0])]


def _yes_no(question: str, passages: Passages) -> str:
    """Returns yes if the rest of the question is said of each thing that it names."""
    names = [part for name in _names(question, of_question=True) for part in name.split(" and ")][:2]
    rest = _content(question) - {word for name in names for word in _content(name)}
    texts = [_content(_about(name, passages)) for name in names]
    if not rest or not all(texts):
        return "yes"
    if re.search(r"\bsame\b", question, re.I) and len(texts) == 2:
        # Is what both are said to be the same? Judged by the nationality-like words at the start of their passages.
        openings = [set(_SPAN.findall(_about(name, passages)[:250])) - set(_SPAN.findall(name)) for name in names]
        return "yes" if openings[0] & openings[1] - _OPENERS else "no"
    return "yes" if all(any(_alike(word, other) for word in rest for other in text) for text in texts) else "no"


def _about(name: str, passages: Passages) -> str:
    """Returns the text of the passage whose title is most like a name; empty if none is."""
    words = _content(name)
    best = max(passages, key=lambda passage: _overlap(words, _content(passage[0])), default=None)
    return best[1] if best is not None and _overlap(words, _content(best[0])) > 0 else ""


def _best_match(pattern: re.Pattern[str], question: str, passages: Passages) -> str | None:
    """Returns the match in the sentence that shares most with the question."""
    known = _plain(question)
    best: tuple[float, str] | None = None
    for score, sentence in _scored_sentences(question, passages):
        found = next((match[0] for match in pattern.finditer(sentence) if _plain(match[0]) not in known), None)
        if found is not None and (best is None or score > best[0]):
            best = (score, found)
    return best[1] if best else None


def _ranked_names(question: str, passages: Passages) -> list[str]:
    """Returns the names in the passages that the question does not hold, the best supported first."""
    known = _plain(question)
    scores: defaultdict[str, float] = defaultdict(float)
    for score, sentence in _scored_sentences(question, passages):
        for name in dict.fromkeys(_names(sentence)):
            if _plain(name) not in known:
                scores[name] += score
    for title, _ in passages:
        if title in scores:
            scores[title] *= 1.5
    return sorted(scores, key=lambda name: -scores[name])


def _scored_sentences(question: str, passages: Passages) -> Iterator[tuple[float, str]]:
    """Yields sentences with what they share with the question; words that many passages hold count little."""
    words = _content(question)
    spread = Counter(word for title, text in passages for word in words & _content(f"{title} {text}"))
    for title, text in passages:
        of_title = words & _content(title)
        for sentence in _SENTENCE.split(text):
            shared = (words & _content(sentence)) | of_title
            yield sum(1 / spread[word] for word in shared) ** 2, sentence


def _names(text: str, *, of_question: bool = False) -> list[str]:
    """Returns quoted titles and runs of capitalised words, without an opening word that is capitalised only there."""
    names = [*_QUOTED.findall(text)] if of_question else []
    for position, span in enumerate(_SPAN.findall(text)):
        words = span.rstrip(".,'’").split()
        while words and (words[0] in _OPENERS or (of_question and position == 0 and words[0].lower() in _COMMON)):
            words = words[1:]
        while words and words[0].islower():
            words = words[1:]
        name = " ".join(words)
        if len(name) > 1 and name.lower() not in _COMMON and name not in _CALENDAR:
            names.append(re.sub(r"['’]s$", "", name))
    return list(dict.fromkeys(names))


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))


def _content(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in _COMMON}


def _overlap(left: set[str], right: set[str]) -> float:
    return len(left & right) / max(1, len(left | right))


def _alike(left: str, right: str) -> bool:
    return left == right or (min(len(left), len(right)) >= 4 and left[:5] == right[:5])
