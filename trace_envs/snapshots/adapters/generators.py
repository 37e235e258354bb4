"""The state of random generators as plain values, and generators made again from it.

Invariant: a generator that is made from a `GeneratorState` draws and spawns what the one that it was taken from would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots.arrays import BIT_GENERATORS, check_generator_state

_LEGACY, _PYTHON = "RandomState", "random.Random"

# Spaces that are not made of others.
_SIMPLE = frozenset(
    {gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiBinary, gym.spaces.MultiDiscrete, gym.spaces.Text}
)

Generator = np.random.Generator | np.random.RandomState | random.Random


@dataclass(frozen=True, slots=True)
class GeneratorState:
    """What a random generator will draw.

    Attributes:
        kind: Name of NumPy's bit generator; "RandomState" or "random.Random" for the two other interfaces.
        state: Its state, as the generator itself gives it.
        origin: Entropy, spawn key and number of children spawned of the seed sequence that it came from, because
            `Generator.spawn` draws on them; `None` where there is none.
    """

    kind: str
    state: Any
    origin: tuple[Any, tuple[int, ...], int] | None = None


_NEVER_ASKED: tuple[GeneratorState | None, ...] = (None,)


def is_generator(value: object) -> bool:
    """Says whether a value is a generator that `freeze` can carry."""
    if isinstance(value, np.random.Generator):
        return type(value) is np.random.Generator and type(value.bit_generator).__name__ in BIT_GENERATORS
    return type(value) in (np.random.RandomState, random.Random)


def _origin(bits: np.random.BitGenerator) -> tuple[Any, tuple[int, ...], int] | None:
    sequence = bits.seed_seq
    if type(sequence) is not np.random.SeedSequence:
        return None
    return sequence.entropy, tuple(sequence.spawn_key), sequence.n_children_spawned


def freeze(generator: Generator) -> GeneratorState:
    """Returns the state of a generator."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return GeneratorState(type(bits).__name__, bits.state, _origin(bits))
    if isinstance(generator, np.random.RandomState):
        return GeneratorState(_LEGACY, generator.get_state(legacy=False))
    return GeneratorState(_PYTHON, generator.getstate())


def thaw(frozen: GeneratorState) -> Generator:
    """Returns a new generator with a state."""
    if frozen.kind == _PYTHON:
        made = random.Random()
        made.setstate(frozen.state)
        return made
    _check(frozen)
    if frozen.kind == _LEGACY:
        legacy = np.random.RandomState(np.random.MT19937(0))
        legacy.set_state(frozen.state)
        return legacy
    entropy, spawn_key, children = frozen.origin or (0, (), 0)
    sequence = np.random.SeedSequence(entropy, spawn_key=spawn_key, n_children_spawned=children)
    bits = BIT_GENERATORS[frozen.kind](sequence)
    bits.state = frozen.state
    return np.random.Generator(bits)


def thaw_into(frozen: GeneratorState, own: object) -> Generator:
    """Returns `own` with the state set if nothing else tells it from a new generator, else a new one."""
    if not can_take(frozen, own):
        return thaw(frozen)
    _check(frozen)
    own.bit_generator.state = frozen.state  # type: ignore[attr-defined]
    return own  # type: ignore[return-value]


def can_take(frozen: GeneratorState, own: object) -> bool:
    """Says whether nothing but its state tells `own` from a new generator."""
    if type(own) is not np.random.Generator or frozen.origin is None:
        return False
    bits = own.bit_generator
    return type(bits).__name__ == frozen.kind and bool(_origin(bits) == frozen.origin)


def _check(frozen: GeneratorState) -> None:
    """Refuses states that NumPy takes unchecked and that would lead a generator outside its own memory."""
    if not isinstance(frozen.state, dict) or frozen.state.get("bit_generator") not in BIT_GENERATORS:
        raise ValueError(f"the snapshot is damaged: it does not hold the state of a {frozen.kind}")
    check_generator_state(frozen.state)


def seeded(kind: str, seed: int, index: int) -> Generator:
    """Returns a new generator of a kind, seeded with the `index`-th child of `SeedSequence(seed)`."""
    child = np.random.SeedSequence(seed, spawn_key=(index,))
    if kind == _PYTHON:
        return random.Random(int.from_bytes(child.generate_state(8).tobytes(), "little"))
    if kind == _LEGACY:
        return np.random.RandomState(np.random.MT19937(child))
    return np.random.Generator(BIT_GENERATORS[kind](child))


def kind_of(generator: Generator) -> str:
    """Returns what `GeneratorState.kind` would be."""
    if isinstance(generator, np.random.Generator):
        return type(generator.bit_generator).__name__
    return _LEGACY if isinstance(generator, np.random.RandomState) else _PYTHON


def touch(env: gym.Env) -> None:
    """Makes an environment create its `np_random`, if it has not yet.

    Gymnasium creates it, seeded by the operating system, when it is first asked for. Left until after a snapshot, two
    futures of one moment would each get one of their own.
    """
    if isinstance(env, gym.Env) and env._np_random is None:
        env.np_random  # noqa: B018 (asked for its effect)


def subspaces(space: gym.Space) -> Iterator[gym.Space]:
    """Yields a space and all spaces that it is made of, always in the same order."""
    yield space
    for value in vars(space).values():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for part in parts:
            if isinstance(part, gym.Space):
                yield from subspaces(part)


def space_states(space: gym.Space) -> tuple[GeneratorState | None, ...]:
    """Returns the states of the generators of a space and its parts, `None` for one that was never asked for."""
    if type(space) in _SIMPLE:
        own = space.__dict__["_np_random"]
        return _NEVER_ASKED if own is None else (freeze(own),)
    return tuple(None if (own := part.__dict__.get("_np_random")) is None else freeze(own) for part in subspaces(space))


def set_space_states(space: gym.Space, states: tuple[GeneratorState | None, ...], seed: int | None, index: int) -> int:
    """Gives a space what `space_states` returned.

    Args:
        space: A space equal to the one that the states are of.
        states: The states.
        seed: With a seed, each generator is new.
        index: Number of generators that this seed was already used for.

    Returns:
        `index`, counted on.
    """
    for part, frozen in zip(subspaces(space), states, strict=True):
        if frozen is not None:
            part._np_random = thaw(frozen) if seed is None else seeded(frozen.kind, seed, index)  # type: ignore[assignment]
            index += 1
    return index


def attribute_generators(env: gym.Env) -> dict[str, Generator]:
    """Returns the generators directly among the attributes of an environment, by name."""
    return {name: value for name, value in sorted(vars(env).items()) if is_generator(value)}


def freeze_attributes(env: gym.Env, *, origins: bool) -> dict[str, GeneratorState]:
    """Returns the states of an environment's `attribute_generators`; attributes that are one generator share one.

    Args:
        env: The environment.
        origins: Keep the seed sequences, so that `spawn` goes on too; generators then become other objects when they are
            put back into another environment. Without, they always stay the objects that others may refer to.
    """
    touch(env)
    own = attribute_generators(env)
    frozen = {id(generator): freeze(generator) for generator in own.values()}
    if not origins:
        frozen = {key: GeneratorState(state.kind, state.state) for key, state in frozen.items()}
    return {name: frozen[id(generator)] for name, generator in own.items()}


def thaw_attributes(env: gym.Env, states: dict[str, GeneratorState], foreign: gym.Env | None = None) -> None:
    """Puts the generators of an environment back to what `freeze_attributes` returned.

    Args:
        env: The environment.
        states: The states.
        foreign: An environment whose generators must not be touched, should `env` share any with it.
    """
    made: dict[int, Generator] = {}
    used: set[int] = set() if foreign is None else {id(g) for g in attribute_generators(foreign).values()}
    for name, frozen in states.items():
        if id(frozen) not in made:
            own: Any = vars(env).get(name)
            if id(own) in used or not is_generator(own) or kind_of(own) != frozen.kind:
                own = thaw(frozen)
            elif frozen.origin is not None:
                own = thaw_into(frozen, own)
            else:
                set_state(own, frozen)
            used.add(id(own))
            made[id(frozen)] = own
        vars(env)[name] = made[id(frozen)]
    if isinstance(env, gym.Env) and env._np_random_seed is None:
        env._np_random_seed = -1  # "not known"; left at `None`, asking for it would make a new generator


def set_state(generator: Any, frozen: GeneratorState) -> None:
    """Makes a generator draw what the state says; it must be of that kind."""
    if frozen.kind == _PYTHON:
        generator.setstate(frozen.state)
    elif frozen.kind == _LEGACY:
        generator.set_state(frozen.state)
    else:
        generator.bit_generator.state = frozen.state


def reseed(env: gym.Env, seed: int) -> None:
    """Gives every generator among an environment's attributes, and of its spaces, a new state, a function of the seed."""
    touch(env)
    met: set[int] = set()
    for own in attribute_generators(env).values():
        if id(own) not in met:
            set_state(own, freeze(seeded(kind_of(own), seed, len(met))))
            met.add(id(own))
    if isinstance(env, gym.Env):
        env._np_random_seed = seed
    index = len(met)
    for _, value in sorted((n, v) for n, v in vars(env).items() if isinstance(v, gym.Space)):
        index = set_space_states(value, space_states(value), seed, index)
