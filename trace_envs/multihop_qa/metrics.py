"""How answers are scored.

Invariant: on ordinary answers the scores are those of the official SQuAD and HotpotQA evaluation scripts. They depart
from them in two ways: texts are brought to Unicode's composed form first, and two answers of which normalisation leaves
nothing ("A", "!") are compared as written instead of being called equal.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize_answer(text: str) -> str:
    """Returns a text without case, ASCII punctuation, English articles and superfluous blanks."""
    text = unicodedata.normalize("NFC", text).lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Returns whether a prediction equals one of the accepted answers after normalisation."""
    return any(_same(prediction, answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Returns the greatest word-level F1 of a prediction with an accepted answer.

    As in HotpotQA's script, yes, no and noanswer share no words with anything but themselves.
    """
    return max((_f1(prediction, answer) for answer in answers), default=0.0)


def supporting_recall(retrieved_titles: Iterable[str], supporting: Iterable[str]) -> float:
    """Returns the share of the supporting titles that were retrieved; 1 where nothing needed to be."""
    wanted = set(supporting)
    return len(wanted & set(retrieved_titles)) / len(wanted) if wanted else 1.0


def _same(prediction: str, answer: str) -> bool:
    left, right = normalize_answer(prediction), normalize_answer(answer)
    if not left and not right:
        return prediction.strip().lower() == answer.strip().lower() != ""
    return left == right


def _f1(prediction: str, answer: str) -> float:
    left, right = normalize_answer(prediction), normalize_answer(answer)
    if left != right and (left in _CLOSED or right in _CLOSED):
        return 0.0
    ours, theirs = left.split(), right.split()
    if not ours or not theirs:
        return float(_same(prediction, answer))
    common = (Counter(ours) & Counter(theirs)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)
