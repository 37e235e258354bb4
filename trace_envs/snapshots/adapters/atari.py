"""The adapter of the Arcade Learning Environment (ale-py).

Invariant: a restored emulator goes on as the original would have: the machine, the generator of sticky actions, and the
action that is held.

`clone_state(include_rng=True)` leaves out one thing. With `repeat_action_probability` > 0 the emulator may repeat, in the
next frame, the action of the frame before; that held action is in no state and cannot be asked for, and an emulator that
is restored goes on holding whatever it held when it was restored. It does survive a restore, though, so it can be read in
a machine of our own making: the cloned state with a few instructions in its memory that store what the joystick port
shows, and a generator that always repeats. It is set in the same machine with a generator that never repeats.

A new seed is given by writing the state of a seeded MT19937 where the cloned state has that of the emulator's.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.base import Foreign

# Program of the machine in which the held action is read and set, for address $80, the beginning of the memory:
#     SEI; CLD; LDA #0; STA VBLANK          fire buttons not latched
#     LDA SWCHA; STA $F0                    joystick directions, paddles' buttons
#     LDA INPT4; STA $F1                    joystick's fire button
# next: LDA #2; STA VSYNC; 4x STA WSYNC; LDA #0; STA VSYNC; JMP next
# Each frame ends before its first visible line, so an even number of frames leaves the screen what it was.
_PROGRAM = bytes.fromhex("78d8a9008501ad800285f0a50c85f1a90285008502850285028502a90085004c8f00")
_DIRECTIONS, _FIRE = 0x70, 0x71  # where it stores what it read, in the 128 bytes of memory
_PADDLE_STEP = 23000  # change of a paddle's position in a frame, at full strength
_ALWAYS = b"0 " * 624 + b"0"  # 624 words of MT19937, all of which come out as 0, and the position among them


def _never() -> bytes:
    """Returns a state of MT19937 whose next 624 words come out as 2**32 - 1: its tempering, undone."""
    word = 0xFFFFFFFF
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    known = word
    for _ in range(5):
        known = word ^ ((known << 7) & 0x9D2C5680)
    word = known
    for _ in range(3):
        known = word ^ (known >> 11)
    return b"%d " % (known & 0xFFFFFFFF) * 624 + b"0"


_NEVER = _never()


@dataclass(frozen=True, slots=True)
class Emulator:
    """The state of an emulator.

    Attributes:
        state: The machine and its generators, as ale-py serialises them.
        held: The action that may be repeated in the next frame and the strength it was given with; `None` where none
            can be.
        generators: States of the generators among the environment's attributes.
    """

    state: bytes
    held: tuple[int, float] | None
    generators: dict[str, generators.GeneratorState] = field(hash=False)


codec.register(Emulator, "adapters.Emulator")


class Atari(Foreign):
    """`AtariEnv` of ale-py."""

    name = "ale"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks at the class, then whether the held action can be read in this release of ale-py."""
        module = sys.modules.get("ale_py.env")
        if module is None or not isinstance(env, module.AtariEnv):
            return "it is no AtariEnv of ale-py"
        if type(env) is not module.AtariEnv:
            return "it is a subclass of AtariEnv, whose own attributes would be lost"
        try:
            if _is_sticky(env.ale) and not env.ale.game_over():
                _signs(env.ale)
        except (LookupError, ValueError, struct.error) as error:
            return f"this release of ale-py writes its states in another way ({error})"
        return None

    def state(self, env: gym.Env) -> Emulator:
        """Clones the emulator's state and reads the held action."""
        ale = env.ale  # type: ignore[attr-defined]
        held = _held(ale) if _is_sticky(ale) and not ale.game_over() else None
        return Emulator(_cloned(ale), held, generators.freeze_attributes(env, origins=True))

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Sets the held action and restores the emulator's state.

        Raises:
            ValueError: The payload is none of an emulator, or of one with another chance of sticky actions.
        """
        if not isinstance(payload, Emulator):
            raise ValueError(f"the snapshot does not hold the state of an emulator but a {type(payload).__name__}")
        ale = env.ale  # type: ignore[attr-defined]
        state = payload.state
        if _game(state) != _game(_cloned(ale)):
            raise ValueError(f"the snapshot is of another game than this {type(env).__name__} plays")
        if payload.held is not None:
            _hold(ale, state, *payload.held)
        if seed is not None:
            bits = np.random.MT19937(np.random.SeedSequence(seed, spawn_key=(0, 0))).state["state"]
            text = " ".join(map(str, [*bits["key"].tolist(), bits["pos"]]))
            state = _State(state).with_generator(text.encode())
        _restore(ale, state)
        generators.thaw_attributes(env, payload.generators)
        if seed is not None:
            generators.reseed(env, seed)


class _State:
    """The parts of a serialised state: head (machine), text of the generator of sticky actions, tail (paddle limits)."""

    def __init__(self, state: bytes):
        self.tail = state[-8:]
        start = state.rindex(b"\0", 0, -8) + 1
        (length,) = struct.unpack("<i", state[start - 4 : start])
        self.head = state[: start - 4]
        if length != len(state) - 8 - start:
            raise ValueError("the generator is not where it should be")

    def with_generator(self, text: bytes) -> bytes:
        """Returns the state with another generator."""
        return _with_generator(self.head, text, self.tail)

    def probe(self, text: bytes) -> bytes:
        """Returns the state with `_PROGRAM` about to be run, paddles in the middle, and another generator."""
        head = bytearray(self.head)
        cpu, ram = head.index(b"M6502"), head.index(b"M6532") + 5
        (length,) = struct.unpack_from("<i", head, cpu - 4)
        if struct.unpack_from("<i", head, ram) != (128,):
            raise ValueError("the memory is not where it should be")
        struct.pack_into("<i", head, cpu + length + 20, 0x80)  # the program counter
        struct.pack_into(f"<{len(_PROGRAM)}i", head, ram + 4, *_PROGRAM)
        struct.pack_into("<i", head, 0, self.middle)
        return _with_generator(bytes(head), text, self.tail)

    @property
    def middle(self) -> int:
        """The middle of the left paddle's range."""
        return sum(struct.unpack("<2i", self.tail)) // 2


def _with_generator(head: bytes, text: bytes, tail: bytes) -> bytes:
    # Six integers, then the length of the machine's part, which the generator is the end of.
    return (
        head[:24]
        + struct.pack("<i", len(head) - 24 + len(text))
        + head[28:]
        + struct.pack("<i", len(text))
        + text
        + tail
    )


def _cloned(ale: Any) -> bytes:
    state: bytes = ale.cloneState(include_rng=True).serialize()
    return state


def _restore(ale: Any, state: bytes) -> None:
    ale.restoreState(sys.modules["ale_py"].ALEState(state))


def _is_sticky(ale: Any) -> bool:
    return bool(ale.getFloat("repeat_action_probability") > 0)


def _read(ale: Any, probe: bytes, middle: int) -> tuple[int, int, int]:
    """Returns what the machine's ports show of the held action: directions, fire button, movement of the paddle."""
    _restore(ale, probe)
    ale.act(0)
    memory = ale.getRAM()
    (paddle,) = struct.unpack_from("<i", ale.cloneState().serialize())
    ale.act(0)
    return int(memory[_DIRECTIONS]) & 0xF0, int(memory[_FIRE]) & 0x80, paddle - middle


_KNOWN: dict[bytes, dict[tuple[int, int, int], int]] = {}


def _game(state: bytes) -> bytes:
    """Returns the checksum of the cartridge."""
    return state[28:64]


def _signs(ale: Any) -> dict[tuple[int, int, int], int]:
    """Returns which action shows how, found out once for each game. Actions that show the same do the same."""
    state = _cloned(ale)
    game = _game(state)
    if game not in _KNOWN:
        parts = _State(state)
        signs: dict[tuple[int, int, int], int] = {}
        try:
            held = _read(ale, parts.probe(_ALWAYS), parts.middle)
            for action in range(18):
                _hold(ale, state, action, 1.0)
                signs.setdefault(_read(ale, parts.probe(_ALWAYS), parts.middle), action)
            action, strength = _action(signs, held)
            _hold(ale, state, action, strength)
        finally:
            _restore(ale, state)
        if len(signs) < 6:  # a paddle's two directions and none, each with and without its button
            raise ValueError("the joystick port does not show the actions")
        _KNOWN[game] = signs
    return _KNOWN[game]


def _held(ale: Any) -> tuple[int, float]:
    """Returns the held action and its strength; the emulator is left as it was."""
    signs = _signs(ale)
    state = _cloned(ale)
    parts = _State(state)
    try:
        held = _read(ale, parts.probe(_ALWAYS), parts.middle)
    finally:
        _restore(ale, state)
    return _action(signs, held)


def _action(signs: dict[tuple[int, int, int], int], seen: tuple[int, int, int]) -> tuple[int, float]:
    directions, fire, paddle = seen
    if paddle in (0, _PADDLE_STEP, -_PADDLE_STEP):
        return signs[seen], 1.0
    # The emulator moves a paddle by the whole part of step times strength.
    full = _PADDLE_STEP if paddle > 0 else -_PADDLE_STEP
    return signs[directions, fire, full], (abs(paddle) + 0.5) / _PADDLE_STEP


def _hold(ale: Any, state: bytes, action: int, strength: float) -> None:
    """Makes the emulator hold an action; the machine is another afterwards and has to be restored."""
    _restore(ale, _State(state).probe(_NEVER))
    ale.act(action, strength)
    ale.act(action, strength)
