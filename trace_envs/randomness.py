"""`OwnGenerator`: an environment's random generator, and the record of its state.

Invariant: `record` is `None` unless it is certain that the generator is in that state: nobody else has ever been given the
generator, and its owner has not drawn from it since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class OwnGenerator:
    """A generator whose state is read and written only where it may have moved.

    That costs more than all the rest of a snapshot, and an environment draws from its generator only when an episode begins.

    Attributes:
        generator: The generator; `None` before the first use.
        record: Its state, where that is certain.
    """

    __slots__ = ("_last", "_lent", "generator", "record")

    def __init__(self, generator: np.random.Generator | None = None, lent: bool = False):
        self.generator = generator
        self.record: Mapping[str, Any] | None = None
        self._last: Mapping[str, Any] | None = None
        self._lent = lent

    def lend(self) -> np.random.Generator | None:
        """Returns the generator to somebody who may keep it and draw from it at any time."""
        self.record, self._lent = None, True
        return self.generator

    def draw(self) -> np.random.Generator:
        """Returns the generator for use by its owner, here and now."""
        self.record = None
        assert self.generator is not None
        return self.generator

    def state(self) -> Mapping[str, Any] | None:
        """Returns the present state as the bit generator gives it, the same object as long as it did not move."""
        if self.record is not None or self.generator is None:
            return self.record
        bits = self.generator.bit_generator
        state: Mapping[str, Any] = bits.state
        # The states of other generators hold arrays, which do not compare as a whole.
        if type(bits) is np.random.PCG64 and state == self._last:
            assert self._last is not None
            state = self._last
        return self._known(state)

    def put(self, state: Mapping[str, Any]) -> None:
        """Puts the generator into a state.

        Raises:
            ValueError: It is the state of another kind of generator, or none at all.
        """
        assert self.generator is not None
        try:
            self.generator.bit_generator.state = state
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the snapshot's random state does not fit np_random ({error})") from None
        self._known(state)

    def _known(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        self._last = state
        self.record = None if self._lent else state
        return state
