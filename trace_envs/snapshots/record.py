"""`EnvSnapshot`: one moment of one environment, as a value.

Invariant: a snapshot holds no reference to anything that a later step can change; two snapshots are equal exactly when their
states are, whatever is known of them besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from trace_envs.snapshots import codec, framing
from trace_envs.snapshots.compare import difference
from trace_envs.snapshots.digest import digest
from trace_envs.snapshots.errors import ReplayDivergenceError, SnapshotFormatError, SnapshotUnsupportedError
from trace_envs.state import EpisodeState

__all__ = [
    "SCHEMA_VERSION",
    "EnvSnapshot",
    "ReplayDivergenceError",
    "SnapshotFormatError",
    "SnapshotUnsupportedError",
    "Snapshotable",
]

SCHEMA_VERSION = 2
ELAPSED = "elapsed seconds"  # no attribute of any wrapper can have this name
"""Time that an episode has taken so far, in the state of `RecordEpisodeStatistics`: the only clock in a snapshot."""


class _Layout:
    """The attributes of a snapshot while it is made; see `EnvSnapshot.quick`."""

    __slots__ = (
        "adapter",
        "config",
        "env_id",
        "episode_return",
        "info",
        "observation",
        "payload",
        "random_state",
        "turn",
        "version",
        "wrappers",
    )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class EnvSnapshot(_Layout):
    """One moment of one environment.

    Snapshots are equal if `env_id`, `turn`, `payload`, `random_state`, `wrappers`, `adapter`, `config` and `version` are
    (see `difference`); what was last seen of the environment is a consequence of these and takes no part.

    Attributes:
        env_id: Registered id (or class name) of the environment that it was taken from.
        turn: Number of turns taken in the episode; `None` where neither the environment nor a wrapper counts them.
        payload: The environment's own state, as its adapter keeps it.
        random_state: State of the environment's `np_random`, as its bit generator gives it, where the payload does not hold it.
        wrappers: For each wrapper of the stack, outermost first: class name and its mutable attributes.
        adapter: Name of the adapter that took it.
        config: What has to be equal in an environment that it is restored into (data set, limits, ...), plain data.
        observation: Last observation, where it is known.
        info: Last info, where it is known.
        episode_return: Sum of rewards so far, where it is known.
        version: Version of this record's layout.
    """

    env_id: str
    turn: int | None
    payload: Any
    random_state: Mapping[str, Any] | None = None
    wrappers: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    adapter: str = "native"
    config: Mapping[str, Any] | None = None
    observation: Any = None
    info: Mapping[str, Any] | None = None
    episode_return: float | None = None
    version: int = field(default=SCHEMA_VERSION)

    @classmethod
    def quick(
        cls,
        env_id: str,
        turn: int,
        payload: Any,
        random_state: Mapping[str, Any] | None,
        config: Mapping[str, Any],
        observation: Any,
        episode_return: float,
    ) -> EnvSnapshot:
        """Returns what the constructor would, in a third of its time: for environments that are branched at every turn."""
        # Filled while it can be, frozen afterwards: both classes have the same attributes, at the same places.
        made: Any = _new(_Layout)
        made.env_id = env_id
        made.turn = turn
        made.payload = payload
        made.random_state = random_state
        made.wrappers = ()
        made.adapter = "native"
        made.config = config
        made.observation = observation
        made.info = None
        made.episode_return = episode_return
        made.version = SCHEMA_VERSION
        made.__class__ = cls
        return made

    def state(self) -> dict[str, Any]:
        """Returns the attributes that make up the state, by name: without what an episode has taken of the clock's time."""
        state = {name: getattr(self, name) for name in _STATE}
        state["wrappers"] = tuple(
            (name, {key: value for key, value in held.items() if key != ELAPSED}) for name, held in self.wrappers
        )
        if isinstance(self.payload, EnvSnapshot):
            state["payload"] = self.payload.state()
        return state

    @property
    def digest(self) -> str:
        """A digest of the state in hex, computed at every call: equal exactly when the snapshots are.

        Raises:
            SnapshotUnsupportedError: Part of the state is no plain data.
        """
        return digest(self.state(), "snapshot")

    def to_bytes(self) -> bytes:
        """Returns the snapshot as plain data: compressed JSON with a version, a length and a checksum, no pickle.

        Raises:
            SnapshotUnsupportedError: Part of it is no plain data; the message names the part and its class.
        """
        content = codec.encode({f.name: getattr(self, f.name) for f in fields(self)}, "snapshot")
        return framing.frame(content, SCHEMA_VERSION)

    @classmethod
    def from_bytes(cls, data: bytes) -> EnvSnapshot:
        """Returns the snapshot that `to_bytes` wrote, in this process or another, today or later.

        Nothing in the bytes is run or imported: objects of classes that are not registered stay inert until an environment of
        theirs is restored.

        Args:
            data: The bytes.

        Raises:
            SnapshotFormatError: The bytes are no snapshot, are truncated or damaged, or are of another schema version.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"expected the bytes of a snapshot, got {type(data).__name__}")
        # The records of this package's own families are known whether or not an environment was made here yet.
        import trace_envs.multihop_qa.data  # noqa: F401

        found = codec.decode(framing.unframe(bytes(data), SCHEMA_VERSION))
        if type(found) is not dict or found.keys() != {f.name for f in fields(cls)}:
            raise SnapshotFormatError("the data is malformed (it does not hold the parts of a snapshot)")
        for name, types in _TYPES.items():
            if not isinstance(found[name], types):
                raise SnapshotFormatError(f"the data is malformed ({name} is of type {type(found[name]).__name__})")
        wrappers = found["wrappers"]
        if not all(
            type(w) is tuple and len(w) == 2 and type(w[0]) is str and isinstance(w[1], Mapping) for w in wrappers
        ):
            raise SnapshotFormatError("the data is malformed (wrappers are not pairs of a name and attributes)")
        return cls(**found)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EnvSnapshot):
            return NotImplemented
        return self is other or difference(self.state(), other.state()) is None

    def __hash__(self) -> int:
        """Agrees with equality; takes the same time at any depth."""
        state = self.payload
        more = (state.key, state.task.task_id) if isinstance(state, EpisodeState) else ()
        return hash((self.env_id, self.turn, self.adapter, self.version, *more))

    def __repr__(self) -> str:
        turn = "" if self.turn is None else f" at turn {self.turn}"
        return f"<EnvSnapshot of {self.env_id}{turn} ({self.adapter}, {type(self.payload).__name__})>"


_new = object.__new__
_STATE = ("env_id", "turn", "payload", "random_state", "wrappers", "adapter", "config", "version")
_TYPES: dict[str, Any] = {
    "env_id": str,
    "turn": int | None,
    "random_state": Mapping | None,
    "wrappers": tuple,
    "adapter": str,
    "config": Mapping | None,
    "info": Mapping | None,
    "episode_return": int | float | None,
    "version": int,
}


@runtime_checkable
class Snapshotable(Protocol):
    """What an environment (or a wrapper, for everything inside it) offers in order to be branched.

    `restore(snapshot, seed=s)` puts the environment back and gives everything random that follows a new seed, so that two
    branches of one prefix do not share their luck; without a seed, the future repeats exactly.
    """

    def snapshot(self) -> Any:
        """Returns the present moment as a value."""
        ...

    def restore(self, snapshot: Any, *, seed: int | None = None) -> None:
        """Returns to a moment."""
        ...


def check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuses a snapshot of an environment with other settings.

    Raises:
        ValueError: They differ; the message says in what.
    """
    theirs, ours, none = dict(theirs), dict(ours), "unknown"
    if theirs == ours:
        return
    names = [name for name in ours | theirs if theirs.get(name, none) != ours.get(name, none)]
    raise ValueError(
        "the snapshot is of an environment with other settings: "
        + ", ".join(f"{name} was {theirs.get(name, none)!r} and is {ours.get(name, none)!r}" for name in names)
        + "; restore it into one that was made with the same arguments"
    )
