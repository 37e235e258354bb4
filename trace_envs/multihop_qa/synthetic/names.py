"""Name chunks, name words and which split owns which word.

Invariant: a name word is one opener followed by one closer, and belongs to exactly one split whatever the seed. Worlds
of different splits therefore share no name at all, and a tokenizer with one token a chunk cuts every name in one way.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from itertools import product

_OPENERS = (
    "Bal Ber Bor Cal Ced Cor Dal Den Dor Dun Fal Fen Fir Gal Gel Gor Hal Hel Hol Jar Jen Jor Kal Kel Kir Kov Lan Lem "
    "Lor Lun Mal Mar Mel Mir Mor Nal Ner Nor Pal Pel Pir Ral Rin Ros Sal Sel Sil Sor Tal Tel Tir Tor Val Vel Vin Vor "
    "Wal Wen Wil Yar Yel Zan Zel Zor"
)
OPENERS = tuple(_OPENERS.split())
"""First chunks; all of three letters, so a word can be cut in one way only."""

_CLOSERS = (
    "an dor is ond el ar em ith os un eck ira ova in ath or ud esk ane ilo omo ust evi ora ald ent irk oth ula ax bin "
    "cas dek fin gar hum kesh lis mun gab pol rud sa tan vik wyn zo by"
)
CLOSERS = tuple(_CLOSERS.split())
"""Second chunks of every name but a country's."""

COUNTRY_CLOSERS = ("ia", "land", "mark")
"""Second chunks of countries, which no other name has."""

COMPANY_NOUNS = ("Foods", "Bank", "Motors", "Press", "Steel", "Mills")
WORK_NOUNS = ("Nights", "Garden", "Song", "River", "Letters", "Winter")
TEAM_NOUNS = ("Hawks", "Lions", "Bears", "Foxes", "Kings", "Rovers")
NOUNS = {"company": COMPANY_NOUNS, "work": WORK_NOUNS, "team": TEAM_NOUNS}
"""Last words of the names of companies, works and teams; a noun tells the kind."""

SPLITS = ("train", "validation", "test", "test_longer", "test_compositions", "test_distractors")
"""The splits, in the order that seeds their generators: append only."""

_TRAIN_SHARE = 0.4  # training needs most words, so that a model learns to copy chunks and not to know words


def name_chunks() -> tuple[list[str], list[str]]:
    """Returns the openers and the closers (a country's included) that every name word is made of."""
    return list(OPENERS), [*CLOSERS, *COUNTRY_CLOSERS]


def _ranked(words: list[str]) -> list[str]:
    # A hash and not a generator: the partition must stay the same in every release of numpy.
    return sorted(words, key=lambda word: blake2b(word.encode(), digest_size=8).digest())


def _share(words: list[str], split: str) -> tuple[str, ...]:
    ranked = _ranked(words)
    n_train = int(_TRAIN_SHARE * len(ranked))
    if split == SPLITS[0]:
        return tuple(ranked[:n_train])
    rest = ranked[n_train:]
    return tuple(rest[SPLITS.index(split) - 1 :: len(SPLITS) - 1])


@cache
def split_words(split: str) -> tuple[str, ...]:
    """Returns the name words (all but countries) that belong to a split."""
    return _share([a + b for a, b in product(OPENERS, CLOSERS)], split)


@cache
def split_countries(split: str) -> tuple[str, ...]:
    """Returns the country names that belong to a split."""
    return _share([a + b for a, b in product(OPENERS, COUNTRY_CLOSERS)], split)
