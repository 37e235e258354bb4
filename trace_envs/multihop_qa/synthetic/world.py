"""An invented world and its encyclopedia.

Invariant: a world is a function of its split, its size and the generator's state. No two of its entities share a name
or an alias, every fact has one value, and exactly one passage states it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from trace_envs.multihop_qa.data import Passage
from trace_envs.multihop_qa.synthetic import names, relations

_SIZES = {"country": 10, "city": 60, "person": 300, "company": 90, "work": 140, "team": 45}
_MINIMA = {"country": 3, "city": 8, "person": 24, "company": 8, "work": 8, "team": 4}
_ALIASED = {"city": 0.1, "person": 0.12, "company": 0.15, "work": 0.12, "team": 0.1}
_HEADS = {"given": 70, "family": 70, "other": 90}
_MAX_SENTENCES = 3

# How an article may be divided: the suffix of the title ("" for none) of each half, and what each half states.
_LIFE = ("birthplace", "birth year", "spouse")
_HISTORY = ("founder", "founding year")
_Division = tuple[tuple[str, tuple[str, ...]], ...]
_DIVISIONS: Mapping[str, tuple[tuple[float, _Division], ...]] = {
    "person": (
        (0.10, (("", _LIFE), ("career", ("employer", "teacher", "rival")))),
        (0.10, (("life", _LIFE), ("career", ("employer", "teacher", "rival")))),
        (0.40, (("life", _LIFE), ("career", ("employer", "rival")), ("studies", ("teacher",)))),
    ),
    "company": (
        (0.15, (("", _HISTORY), ("offices", ("headquarters", "supplier")))),
        (0.30, (("history", _HISTORY), ("offices", ("headquarters",)), ("trade", ("supplier",)))),
    ),
    "work": ((0.30, (("production", ("director",)), ("release", ("publisher", "release year")))),),
}


@dataclass(frozen=True, slots=True)
class Entity:
    """Somebody or something with an article."""

    name: str
    kind: str
    alias: str | None = None

    @property
    def answers(self) -> tuple[str, ...]:
        """The names that are accepted for it, the canonical one first."""
        return (self.name,) if self.alias is None else (self.name, self.alias)


@dataclass(frozen=True)
class World:
    """Entities, facts and passages.

    Attributes:
        entities: By name.
        facts: Relation to value (a name, or a number in digits), by name of the subject.
        titles: Title of the passage that states a fact, by (subject, relation).
        passages: The corpus, in a shuffled order.
        by_kind: Names of a kind, in a fixed order.
    """

    entities: dict[str, Entity] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    titles: dict[tuple[str, str], str] = field(default_factory=dict)
    passages: list[Passage] = field(default_factory=list)
    by_kind: dict[str, list[str]] = field(default_factory=dict)


def build_world(split: str, rng: np.random.Generator, *, scale: float, crowd: float = 1.0) -> World:
    """Builds the world of a split.

    Args:
        split: Whose name words to use.
        rng: Source of every choice.
        scale: Size, as a multiple of an evaluation world (about 900 passages).
        crowd: How many more people share a first or family name, and companies, works and teams a head word.

    Returns:
        The world, facts and passages included.

    Raises:
        ValueError: The split's words do not suffice for so large a world.
    """
    world = World()
    _name_entities(world, split, rng, scale, crowd)
    _draw_facts(world, rng)
    for entity in world.entities.values():
        _write_article(world, entity, rng)
    order = rng.permutation(len(world.passages))
    world.passages[:] = [world.passages[i] for i in order]
    return world


def _name_entities(world: World, split: str, rng: np.random.Generator, scale: float, crowd: float) -> None:
    sizes = {kind: max(_MINIMA[kind], round(size * scale)) for kind, size in _SIZES.items()}
    # However crowded, there are two and a half times as many pairs of names as people.
    least = ceil((2.5 * sizes["person"]) ** 0.5)
    heads = {role: max(least, round(n * scale / crowd)) for role, n in _HEADS.items()}
    n_spare = sizes["city"] // 4  # second names of cities
    words, countries = names.split_words(split), names.split_countries(split)
    needed = sizes["city"] + n_spare + sum(heads.values())
    if needed > len(words) or sizes["country"] > len(countries):
        raise ValueError(f"scale {scale} needs {needed} name words, but split {split!r} has {len(words)}")
    pool = [words[i] for i in rng.permutation(len(words))]
    cities, spare = pool[: sizes["city"]], pool[sizes["city"] : sizes["city"] + n_spare]
    rest = pool[len(cities) + len(spare) :]
    given, rest = rest[: heads["given"]], rest[heads["given"] :]
    family, rest = rest[: heads["family"]], rest[heads["family"] :]
    other = rest[: heads["other"]]
    taken: set[str] = set()

    def fresh(first: Sequence[str], last: Sequence[str]) -> str:
        for _ in range(10_000):
            name = f"{first[int(rng.integers(len(first)))]} {last[int(rng.integers(len(last)))]}"
            if name not in taken:
                taken.add(name)
                return name
        raise ValueError(f"scale {scale} and crowd {crowd} leave too few names in split {split!r}")

    # Companies are also called after families and teams after cities that need not be theirs: reading has to settle it.
    firsts = {"person": given, "company": other + family, "work": other + cities, "team": other + cities}

    def add(kind: str, name: str, alias: str | None = None) -> None:
        world.entities[name] = Entity(name, kind, alias)
        world.by_kind.setdefault(kind, []).append(name)
        world.facts[name] = {}

    for i in rng.permutation(len(countries))[: sizes["country"]]:
        add("country", countries[i])
    for name in cities:
        add("city", name, spare.pop() if spare and rng.random() < _ALIASED["city"] else None)
    for kind in ("person", "company", "work", "team"):
        lasts = family if kind == "person" else names.NOUNS[kind]
        for _ in range(sizes[kind]):
            name = fresh(firsts[kind], lasts)
            # A person keeps the family name under an alias; the others keep the noun that tells their kind.
            keep = name.split()[-1:]
            alias = fresh(firsts[kind], keep) if rng.random() < _ALIASED[kind] else None
            add(kind, name, alias)


def _draw_facts(world: World, rng: np.random.Generator) -> None:
    def some(kind: str, *, but: str = "") -> str:
        pool = world.by_kind[kind]
        while (name := pool[rng.integers(len(pool))]) == but:
            pass
        return name

    numbers = {"release year": (1901, 2020), "birth year": (1901, 2000), "founding year": (1801, 2010)}
    optional = {"teacher": 0.8, "employer": 0.8, "rival": 0.6, "supplier": 0.7, "publisher": 0.9, "sponsor": 0.9}
    for name, entity in world.entities.items():
        for relation in relations.relations_of(entity.kind):
            if relation.name in ("spouse", "capital", "country") or rng.random() > optional.get(relation.name, 1.0):
                continue
            if relation.name == "population":
                value = str(int(rng.integers(11, 999)) * 1000)
            elif relation.value == relations.NUMBER:
                value = str(int(rng.integers(*numbers[relation.name])))
            else:
                value = some(relation.value, but=name)
            world.facts[name][relation.name] = value
    people = [world.by_kind["person"][i] for i in rng.permutation(len(world.by_kind["person"]))]
    for one, other in zip(people[::2], people[1::2], strict=False):
        if rng.random() < 0.85:
            world.facts[one]["spouse"], world.facts[other]["spouse"] = other, one
    for i, city in enumerate(world.by_kind["city"]):
        countries = world.by_kind["country"]
        country = countries[i] if i < len(countries) else some("country")
        world.facts[city]["country"] = country
        world.facts[country].setdefault("capital", city)


def _write_article(world: World, entity: Entity, rng: np.random.Generator) -> None:
    facts = world.facts[entity.name]
    division: _Division = (("", tuple(facts)),)
    draw = rng.random()
    for share, candidate in _DIVISIONS.get(entity.kind, ()):
        if 0 <= draw < share and all(any(r in facts for r in listed) for _, listed in candidate):
            division = candidate
        draw -= share
    for _, listed in division:
        _shorten([relation for relation in listed if relation in facts], facts, rng)
    for suffix, listed in division:
        title = f"{entity.name} ({suffix})" if suffix else entity.name
        stated = [r for r in listed if r in facts]
        for relation in stated:
            world.titles[entity.name, relation] = title
        world.passages.append(Passage(title, " ".join(_sentences(entity, stated, facts, rng))))


def _shorten(stated: list[str], facts: dict[str, str], rng: np.random.Generator) -> None:
    """Drops facts at random until a passage can state the rest, pairs joined, in as many sentences as it may have."""
    spare = sum(set(pair) <= set(stated) for pair in relations.JOINED)
    paired = {relation for pair in relations.JOINED for relation in pair}
    single = [relation for relation in stated if relation not in paired and relation != "country"]
    for i in rng.permutation(len(single))[: max(0, len(stated) - spare - _MAX_SENTENCES)]:
        del facts[single[i]]


def _sentences(entity: Entity, stated: list[str], facts: dict[str, str], rng: np.random.Generator) -> list[str]:
    groups: list[tuple[str, ...]] = [(r,) for r in stated]
    for pair in relations.JOINED:
        if set(pair) <= set(stated) and (len(groups) > _MAX_SENTENCES or rng.random() < 0.6):
            groups = [pair if g == pair[:1] else g for g in groups if g != pair[1:]]
    sentences: list[str] = []
    for i in rng.permutation(len(groups)):
        group = groups[i]
        templates = relations.JOINED.get(group) or relations.RELATIONS[group[0]].templates
        template = templates[rng.integers(len(templates))]
        values = {"v": facts[group[0]], "y": facts[group[-1]]}
        sentences.append(_say(template, entity, values, first=not sentences))
    return sentences


def _say(template: str, entity: Entity, values: dict[str, str], *, first: bool) -> str:
    if first:
        subject = entity.name
        if entity.alias is not None:
            subject = relations.ALIAS.format(name=entity.name, alias=entity.alias)
        return template.format(s=subject, **values).replace(",.", ".")
    if entity.kind == "person":
        return template.format(s=entity.name.split()[-1], **values)
    # The noun form reads "Its director is ...": shorter, and a pronoun has to be resolved by the title.
    noun, _, rest = template.partition(" of {s} ")
    if rest:
        template = f"Its {noun.removeprefix('The ')} {rest}"
    return template.format(s="It" if template.startswith("{s}") else "it", **values)
