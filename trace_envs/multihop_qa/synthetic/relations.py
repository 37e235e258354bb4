"""What can be said of whom, and in which words.

Invariant: a relation is a function (one value per subject), its name is the noun that questions use for it, and no two
relations share a name. The bigrams in `HELD_OUT` occur in questions of `test_compositions` and nowhere else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from trace_envs.multihop_qa.synthetic import names

NUMBER = "number"
"""Kind of the values of numeric attributes."""


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation or attribute.

    Attributes:
        name: The noun of the question.
        subject: Kind of entity it belongs to.
        value: Kind of its values, `NUMBER` for attributes.
        section: Half of the subject's article that states it when the article is divided.
        templates: Sentences over `{s}` and `{v}`; not all of them contain the noun.
        words: Further search words for it, taken from the templates.
    """

    name: str
    subject: str
    value: str
    section: str
    templates: tuple[str, ...]
    words: tuple[str, ...]


def _relation(
    name: str, subject: str, value: str, section: str, words: str, *templates: str, noun: str = "is"
) -> Relation:
    return Relation(
        name, subject, value, section, (f"The {name} of {{s}} {noun} {{v}}.", *templates), tuple(words.split())
    )


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        _relation(
            "director", "work", "person", "production", "directed",
            "{s} was directed by {v}.", "{v} directed {s}.",
        ),
        _relation(
            "publisher", "work", "company", "release", "published",
            "{s} was published by {v}.", "{v} published {s}.",
        ),
        _relation("release year", "work", NUMBER, "release", "released", "{s} was released in {v}."),
        _relation("spouse", "person", "person", "life", "married", "{s} is married to {v}."),
        _relation("teacher", "person", "person", "studies", "studied taught", "{s} studied under {v}.",
                  "{v} taught {s}."),
        _relation("employer", "person", "company", "career", "works job", "{s} works for {v}.",
                  "{s} has a job at {v}."),
        _relation("rival", "person", "person", "career", "competes", "{s} competes with {v}."),
        _relation("birthplace", "person", "city", "life", "born", "{s} was born in {v}."),
        _relation("birth year", "person", NUMBER, "life", "born", "{s} was born in {v}."),
        _relation("founder", "company", "person", "history", "founded", "{s} was founded by {v}.", "{v} founded {s}."),
        _relation("founding year", "company", NUMBER, "history", "founded", "{s} was founded in {v}."),
        _relation("headquarters", "company", "city", "offices", "based", "{s} is based in {v}.", noun="is in"),
        _relation("supplier", "company", "company", "trade", "buys", "{s} buys from {v}.", "{v} delivers to {s}."),
        _relation("mayor", "city", "person", "city", "led", "{s} is led by {v}."),
        _relation("country", "city", "country", "city", "lies", "{s} is a city in {v}.", "{s} lies in {v}."),
        _relation("neighbour", "city", "city", "city", "near", "{s} lies near {v}."),
        _relation("population", "city", NUMBER, "city", "people", "{s} has {v} people.", "{v} people live in {s}."),
        _relation("coach", "team", "person", "team", "coached trains", "{s} is coached by {v}.", "{v} trains {s}."),
        _relation("home city", "team", "city", "team", "plays", "{s} plays in {v}."),
        _relation("sponsor", "team", "company", "team", "sponsored", "{s} is sponsored by {v}."),
        _relation("capital", "country", "city", "country", "governed", "{s} is governed from {v}."),
    )
}  # fmt: skip
"""Every relation, by name."""

JOINED: dict[tuple[str, ...], tuple[str, ...]] = {
    ("birthplace", "birth year"): ("{s} was born in {v} in {y}.",),
    ("founder", "founding year"): ("{s} was founded by {v} in {y}.", "{v} founded {s} in {y}."),
}
"""Pairs of facts that one sentence may state together."""

ALIAS = "{name}, also known as {alias},"
"""How a passage says that its subject has a second name."""

HELD_OUT = frozenset(
    {
        ("coach", "spouse"),
        ("coach", "employer"),
        ("founder", "spouse"),
        ("founder", "birth year"),
        ("director", "teacher"),
        ("director", "birth year"),
        ("mayor", "teacher"),
        ("mayor", "rival"),
        ("rival", "birthplace"),
        ("neighbour", "mayor"),
        ("birthplace", "neighbour"),
        ("supplier", "founder"),
        ("publisher", "supplier"),
        ("spouse", "employer"),
        ("teacher", "birthplace"),
        ("employer", "headquarters"),
        ("sponsor", "founder"),
        ("headquarters", "mayor"),
        ("birthplace", "population"),
    }
)
"""Pairs (inner relation, next relation) that only `test_compositions` asks for; they chain up to eight hops."""


def may_follow(before: str | None, after: str, *, held_out: bool) -> bool:
    """Whether a question may apply `after` to the value of `before`; `held_out` selects the unseen compositions."""
    return before is None or ((before, after) in HELD_OUT) == held_out


def relations_of(kind: str) -> list[Relation]:
    """Returns the relations of a kind of entity, in a fixed order."""
    return [relation for relation in RELATIONS.values() if relation.subject == kind]


QUESTIONS = {
    "chain": "What is {a}?",
    "birth year": "Who was born first, {a} or {b}?",
    "founding year": "Which was founded earlier, {a} or {b}?",
    "release year": "Which was released earlier, {a} or {b}?",
    "population": "Which has more people, {a} or {b}?",
    "country": "Are {a} and {b} in the same country?",
    "birthplace": "Was {a} born in {b}?",
    "headquarters": "Is {a} based in {b}?",
}
"""Question templates: `chain`; comparisons by the number compared; yes/no questions by the last relation."""

FINDING = "The {relation} is {value}."
FINDING_OF = "The {relation} of {subject} is {value}."
FIRST = "First the {relation} of {subject}."
NOT_FOUND = "Not found."
"""Words of an agent's notes: what it found, what it looks for first, and that a search did not help."""


def fixed_words() -> list[str]:
    """Returns every word that is not a name, a number or punctuation, as written, sorted."""
    texts = [ALIAS, *QUESTIONS.values(), FINDING, FINDING_OF, FIRST, NOT_FOUND, "yes no It it Its its"]
    for relation in RELATIONS.values():
        texts += [relation.name, relation.section, *relation.words, *relation.templates]
    for templates in JOINED.values():
        texts += templates
    texts += [noun for nouns in names.NOUNS.values() for noun in nouns]
    return sorted({word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{\w+\}", " ", text))})
