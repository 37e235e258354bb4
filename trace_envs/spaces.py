"""A space of text in any script.

Invariant: every `str` of an admissible length belongs to the space, whatever its characters, and reaches the other side
of a process boundary or a JSON file unchanged, lone surrogates included.

`gymnasium.spaces.Text` lists its characters and reserves `max_length` integers for each text that crosses processes.
There are over a million characters, so this subclass lists none (`characters` are merely those that `sample` draws
from) and registers its own functions for shared memory.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.heap import BufferWrapper
from types import ModuleType
from typing import Any

import numpy as np
from gymnasium.spaces import Text, flatdim, flatten, flatten_space, unflatten
from gymnasium.vector.utils import (
    create_empty_array,
    create_shared_memory,
    read_from_shared_memory,
    write_to_shared_memory,
)

DEFAULT_MAX_LENGTH = 1 << 20

# Letters of several scripts, a combining mark, an emoji outside the basic plane, control characters, a lone surrogate.
_SAMPLE_CHARACTERS = "abcxyzABC0189 .,:;!?'\"()[]{}<>/\\äßñ\u0301αβγДЖя中文字かな한글אבعرहि😀\t\n\r\x00\x1b\u2028\ud800"


class UnicodeText(Text):
    r"""All strings of at least `min_length` and at most `max_length` code points.

    Example:
        >>> space = UnicodeText()
        >>> "Привет\x00" in space
        True
    """

    def __init__(
        self,
        max_length: int = DEFAULT_MAX_LENGTH,
        *,
        min_length: int = 0,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        """Creates the space.

        Args:
            max_length: Most code points of a text. An asynchronous vector environment reserves four bytes of address
                space for each; memory is taken only for what is written.
            min_length: Fewest code points of a text.
            seed: Seed or generator for `sample`.
        """
        super().__init__(max_length, min_length=min_length, charset=_SAMPLE_CHARACTERS, seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Draws a short text: `min_length` to `min_length + 32` characters of several scripts.

        Args:
            mask: Must be `None`: there is no list of characters to mask.
            probability: Must be `None`, likewise.

        Returns:
            A text of the space.

        Raises:
            ValueError: A mask was given.
        """
        if mask is not None or probability is not None:
            raise ValueError("UnicodeText.sample takes neither mask nor probability: its characters are not listed")
        length = int(self.np_random.integers(self.min_length, min(self.max_length, self.min_length + 32) + 1))
        picked = self.np_random.integers(len(self.character_list), size=length)
        return "".join(self.character_list[index] for index in picked)

    def contains(self, x: Any) -> bool:
        """Returns whether `x` is a string of admissible length."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length

    def to_jsonable(self, sample_n: Iterable[str]) -> list[Any]:
        """Returns the texts as they are, except those with surrogates, which become lists of code points.

        JSON would join a high surrogate and a low one that follows it into one character.
        """
        return [[ord(c) for c in text] if _has_surrogates(text) else text for text in sample_n]

    def from_jsonable(self, sample_n: list[Any]) -> list[Any]:
        """Inverse of `to_jsonable`."""
        return [item if isinstance(item, str) else "".join(map(chr, item)) for item in sample_n]

    def __repr__(self) -> str:
        """Gives the bounds."""
        return f"UnicodeText({self.min_length}, {self.max_length})"

    def __eq__(self, other: object) -> bool:
        """Spaces with the same bounds are equal."""
        return (
            isinstance(other, UnicodeText)
            and self.min_length == other.min_length
            and self.max_length == other.max_length
        )

    __hash__ = None  # type: ignore[assignment]  # like every Gymnasium space

    @property
    def is_np_flattenable(self) -> bool:
        """Always false: there is no list of characters to number."""
        return False


def _has_surrogates(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


# Without these, Text's own functions would build arrays of max_length character numbers.


@flatdim.register(UnicodeText)
def _flatdim(space: UnicodeText) -> int:
    raise ValueError(f"{space} cannot be flattened: encode text with a tokenizer instead")


@flatten_space.register(UnicodeText)
def _flatten_space(space: UnicodeText) -> UnicodeText:
    return space


@flatten.register(UnicodeText)
def _flatten(space: UnicodeText, x: str) -> str:  # type: ignore[misc]  # the fallback is generic
    return x


@unflatten.register(UnicodeText)
def _unflatten(space: UnicodeText, x: str) -> str:  # type: ignore[misc]  # the fallback is generic
    return x


@create_empty_array.register(UnicodeText)
def _create_empty_array(space: UnicodeText, n: int = 1, fn: Callable[..., Any] = np.zeros) -> tuple[str, ...]:
    return (" " * space.min_length,) * n


# Shared memory: one slot per environment, a length in bytes followed by the text in UTF-8. ---------------------------

_HEADER = 8


class _Slots:
    """Slots of texts in memory that worker processes inherit.

    `multiprocessing.Array` would fill its memory with zeros and so take all of it at once; the pages behind a
    BufferWrapper are taken when first written, so a slot costs what its longest text so far took.
    """

    def __init__(self, n: int, max_length: int) -> None:
        self._stride = _HEADER + 4 * max_length
        self._wrapper = BufferWrapper(max(1, n * self._stride))
        for index in range(n):
            self.write(index, b"")

    def write(self, index: int, data: bytes) -> None:
        """Replaces the text of a slot."""
        memory, start = self._wrapper.create_memoryview(), index * self._stride
        memory[start : start + _HEADER] = len(data).to_bytes(_HEADER, "little")
        memory[start + _HEADER : start + _HEADER + len(data)] = data

    def read(self, index: int) -> bytes:
        """Returns the text of a slot."""
        memory, start = self._wrapper.create_memoryview(), index * self._stride
        length = int.from_bytes(memory[start : start + _HEADER], "little")
        return bytes(memory[start + _HEADER : start + _HEADER + length])


class SharedTexts(Sequence[str]):
    """The texts that worker processes wrote last, as a live view; a copy is an ordinary tuple.

    `AsyncVectorEnv` reads shared memory once, keeps what it got, and hands out deep copies of it (`copy=True`, the
    default) or the thing itself (`copy=False`). Arrays follow their memory by themselves, strings do not, hence
    this view.
    """

    def __init__(self, slots: _Slots, n: int) -> None:
        self._slots = slots
        self._n = n

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self)[index]
        if not -self._n <= index < self._n:
            raise IndexError(f"index {index} is out of range for {self._n} environments")
        return self._slots.read(index % self._n).decode("utf-8", "surrogatepass")

    def __copy__(self) -> tuple[str, ...]:
        return tuple(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)

    def __repr__(self) -> str:
        return f"SharedTexts{tuple(self)!r}"


@create_shared_memory.register(UnicodeText)
def _create_shared_memory(space: UnicodeText, n: int = 1, ctx: ModuleType = multiprocessing) -> _Slots:
    return _Slots(n, space.max_length)


@read_from_shared_memory.register(UnicodeText)
def _read_from_shared_memory(space: UnicodeText, shared_memory: _Slots, n: int = 1) -> SharedTexts:
    return SharedTexts(shared_memory, n)


@write_to_shared_memory.register(UnicodeText)
def _write_to_shared_memory(space: UnicodeText, index: int, value: str, shared_memory: _Slots) -> None:
    if len(value) > space.max_length:
        raise ValueError(
            f"an observation of {len(value)} characters is longer than the space's max_length of {space.max_length}; "
            "raise max_length or shorten the observation"
        )
    shared_memory.write(index, value.encode("utf-8", "surrogatepass"))
