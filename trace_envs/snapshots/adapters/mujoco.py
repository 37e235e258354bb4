"""The adapter of Gymnasium's MuJoCo environments.

Invariant: after a restore `MjData` holds, bit for bit, whatever a step or an observation can read of it.

The integration state alone (`mj_getState`) is not enough: `mj_step` leaves behind what it derived from the state *before* it
integrated (positions of bodies, contact forces, sensors), and environments read that at the beginning of their next step
and in observations; `mj_forward` at the new state would replace it by other values. So every array is carried, and contacts
and constraint rows, which live in MuJoCo's arena, are made again and given the values that they had.

A changed `MjModel` (domain randomisation) is not carried but noticed: models are compared by their contents, pictures,
meshes and names apart.
"""

from __future__ import annotations

import enum
import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from trace_envs.snapshots import codec
from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.base import Foreign
from trace_envs.snapshots.adapters.copying import Copier, Encoded, Self, is_rendering
from trace_envs.snapshots.plain import class_name
from trace_envs.snapshots.record import SnapshotUnsupportedError

_BASE = "gymnasium.envs.mujoco.mujoco_env:MujocoEnv"
# Attributes that are no part of a moment: what the environment was made with, and how it is looked at.
_LEFT_OUT = frozenset(
    {"model", "data", "mujoco_renderer", "spec", "metadata", "fullpath", "_ezpickle_args", "_ezpickle_kwargs"}
    | {"render_mode", "width", "height", "camera_id", "camera_name"}
)
# Numbers of `MjData` that no array holds and no call below sets. Releases of MuJoCo differ in which of them there are.
_NUMBERS = (
    *("flg_energypos", "flg_energyvel", "flg_subtreevel", "flg_rnepost"),
    *("nbody_awake", "nparent_awake", "ntree_awake", "nv_awake"),
)
# Arrays of the constraint rows that `mj_makeConstraint` lays out.
_ROWS = (
    *("efc_type", "efc_id", "efc_J", "efc_J_rownnz", "efc_J_rowadr", "efc_J_colind", "efc_J_rowsuper", "efc_pos"),
    *("efc_margin", "efc_frictionloss", "efc_diagA", "efc_KBIP", "efc_D", "efc_R", "efc_vel", "efc_aref", "efc_b"),
    *("efc_state", "efc_force"),
)
_NOT_PHYSICAL = ("tex_", "mat_", "mesh_", "skin_", "name", "text_", "vis", "paths", "cam_", "light_")


class Part(enum.Enum):
    """Stands, in kept attributes, where the original referred to the environment's model or data."""

    MODEL = "the model"
    DATA = "the data"


@dataclass(frozen=True, slots=True, eq=False)
class Simulation:
    """A MuJoCo environment at one moment.

    Attributes:
        of: Class of the environment, as "module:qualname".
        model: Digest of the model.
        integration: What `mj_getState` gives for `mjSTATE_INTEGRATION`.
        arrays: All of `MjData`'s arrays of fixed size, by name.
        numbers: Its numbers that are no arrays.
        contacts: The fields of its contacts, each an array with one row for each contact.
        rows: The arrays of its constraint rows.
        attributes: The environment's other attributes.
        spaces: For each attribute that is a space, the states of its generators.
    """

    of: str
    model: str
    integration: np.ndarray
    arrays: dict[str, np.ndarray]
    numbers: dict[str, int]
    contacts: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    attributes: dict[str, Any]
    spaces: dict[str, tuple[generators.GeneratorState | None, ...]]


codec.register(Part, "mujoco.Part")
codec.register(Simulation, "mujoco.Simulation")


def _is_memory_of_mujoco(value: Any) -> bool:
    """Says whether a value is a window on the memory of a model or of data, which is restored itself."""
    if type(value) is np.ndarray:
        while isinstance(value, np.ndarray):
            value = value.base
        return type(value).__name__ == "PyCapsule"
    return type(value).__module__.startswith("mujoco.") and type(value).__name__.startswith("_Mj")


class _Copier(Copier):
    """Refuses windows on MuJoCo's memory inside of other objects: a copy would be one no longer."""

    __slots__ = ()

    def copy(self, value: Any) -> Any:
        """Returns the copy of a value of any kind."""
        if self.keep and id(value) not in self.memo and _is_memory_of_mujoco(value):
            raise self.refusal(
                f"{self._here()}, a {type(value).__name__},",
                "is memory of MuJoCo's inside of another object; make it an attribute of the environment",
            )
        return super().copy(value)


def _is_there(value: Any) -> bool:
    """Says whether a value is an array that lies in MuJoCo's memory.

    For an array that was not made yet, MuJoCo hands out one of NumPy's own, with whatever is in it.
    """
    return isinstance(value, np.ndarray) and value.size > 0 and not value.flags.owndata


class _Windows:
    """Where the contents of one environment's model and data lie in memory. Looking that up takes longer than copying."""

    def __init__(self, model: Any, data: Any):
        import mujoco

        self.model, self.data = model, data
        empty = mujoco.MjData(model)  # has no contacts and no constraints, so nothing in the arena
        self.arrays = {
            name: getattr(data, name)
            for name in dir(data)
            if not name.startswith("_") and _is_there(getattr(empty, name))
        }
        self.numbers = tuple(name for name in _NUMBERS if hasattr(data, name))
        self.contact_fields = tuple(
            name for name in dir(data.contact) if isinstance(getattr(data.contact, name), np.ndarray)
        )
        self.rows = tuple(name for name in _ROWS if hasattr(data, name))
        physical = [name for name in dir(model) if not name.startswith(("_", *_NOT_PHYSICAL))]
        options = {name: getattr(model.opt, name) for name in dir(model.opt) if not name.startswith("_")}
        arrays = [*(getattr(model, name) for name in physical), *options.values()]
        self._model_arrays = [value for value in arrays if _is_there(value)]
        self._options = tuple(name for name, value in options.items() if isinstance(value, int | float))
        self._printed: tuple[bytes, list[Any]] | None = None
        self._print = ""
        self._flags = int(mujoco.mjtState.mjSTATE_INTEGRATION)
        self._size = mujoco.mj_stateSize(model, self._flags)
        self._get: Callable[..., None] = mujoco.mj_getState
        self._set: Callable[..., None] = mujoco.mj_setState

    def fingerprint(self) -> str:
        """Returns a digest of the model; worked out again when it has changed."""
        option = self.model.opt
        content = b"".join(self._model_arrays), [getattr(option, name) for name in self._options]
        if content != self._printed:
            digest = hashlib.blake2b(content[0], digest_size=16)
            digest.update(repr([self.model.signature, content[1]]).encode())
            self._printed, self._print = content, digest.hexdigest()
        return self._print

    def integration(self) -> np.ndarray:
        """Returns the integration state."""
        state = np.empty(self._size)
        self._get(self.model, self.data, state, self._flags)
        return state

    def set_integration(self, state: np.ndarray) -> None:
        """Sets the integration state."""
        self._set(self.model, self.data, state, self._flags)


_WINDOWS: dict[int, tuple[weakref.ref[gym.Env], _Windows]] = {}


def _windows(env: Any) -> _Windows:
    key, model, data = id(env), env.model, env.data
    known = _WINDOWS.get(key)
    if known is None or known[0]() is not env or known[1].model is not model or known[1].data is not data:
        known = weakref.ref(env, lambda _: _WINDOWS.pop(key, None)), _Windows(model, data)
        _WINDOWS[key] = known
    return known[1]


class Mujoco(Foreign):
    """`MjData` as plain arrays, and the other attributes of the environment."""

    name = "mujoco"

    def why_not(self, env: gym.Env) -> str | None:
        """Looks for Gymnasium's base class, by name: nothing is imported."""
        if any(class_name(base) == _BASE for base in type(env).__mro__):
            return None
        return "it is no gymnasium.envs.mujoco.MujocoEnv"

    def state(self, env: gym.Env) -> Simulation:
        """Copies the data and the attributes.

        Raises:
            SnapshotUnsupportedError: An attribute cannot be copied; the message names it.
        """
        generators.touch(env)
        windows = _windows(env)
        data, contact = windows.data, windows.data.contact
        own, spaces = {}, {}
        known: list[tuple[object, object]] = [(env, Self.ENV), (windows.model, Part.MODEL), (data, Part.DATA)]
        copier = _Copier(known, keep=True, views=True)
        for name, value in vars(env).items():
            if isinstance(value, gym.Space):
                spaces[name] = generators.space_states(value)
            elif _is_state(name, value):
                own[name] = copier.attribute(name, value)
        return Simulation(
            class_name(type(env)),
            windows.fingerprint(),
            windows.integration(),
            {name: array.copy() for name, array in windows.arrays.items()},
            {name: int(getattr(data, name)) for name in windows.numbers},
            {name: getattr(contact, name).copy() for name in windows.contact_fields} if data.ncon else {},
            {name: a.copy() for name in windows.rows if _is_there(a := getattr(data, name))} if data.nefc else {},
            own,
            spaces,
        )

    def adopt(self, env: gym.Env, payload: Any, seed: int | None) -> None:
        """Puts data and attributes back.

        MuJoCo itself draws nothing; a seed goes to the generators among the attributes.

        Raises:
            ValueError: The snapshot is of another class or model.
            SnapshotUnsupportedError: An attribute cannot be made here.
        """
        of = class_name(type(env))
        if not isinstance(payload, Simulation) or payload.of != of:
            found = payload.of if isinstance(payload, Simulation) else type(payload).__name__
            raise ValueError(f"the snapshot holds the state of {found!r}, the environment is a {of!r}")
        windows = _windows(env)
        if payload.model != windows.fingerprint() or any(
            name not in windows.arrays or windows.arrays[name].shape != kept.shape
            for name, kept in payload.arrays.items()
        ):
            raise ValueError(
                f"the snapshot was taken with another MuJoCo model than this {type(env).__name__} has now; make both with "
                f"the same model, and where reset() or step() changes it, wrap the environment in trace_envs.Replayable(env)"
            )
        try:
            values, used = _thawed(env, payload.attributes, seed)
        except Encoded:
            package = type(env).__module__.partition(".")[0]
            revived = codec.revive(payload.attributes, lambda made: made.__module__.partition(".")[0] == package)
            values, used = _thawed(env, revived, seed)
        _put_data(windows, payload)
        own = vars(env)
        for name in [name for name, value in own.items() if name not in values and _is_state(name, value)]:
            if not isinstance(own[name], gym.Space):
                del own[name]
        own.update(values)
        if seed is not None and "_np_random_seed" in own:
            own["_np_random_seed"] = seed
        for name in sorted(payload.spaces):
            used = generators.set_space_states(own[name], payload.spaces[name], seed, used)


def _is_state(name: str, value: Any) -> bool:
    """Says whether an attribute that is no space belongs to the moment."""
    return not (name in _LEFT_OUT or _is_memory_of_mujoco(value) or is_rendering(value))


def _thawed(env: Any, attributes: dict[str, Any], seed: int | None) -> tuple[dict[str, Any], int]:
    """Returns the attributes to set, and how many generators the seed was used for."""
    known: list[tuple[object, object]] = [(Self.ENV, env), (Part.MODEL, env.model), (Part.DATA, env.data)]
    frozen = attributes.get("_np_random")
    if seed is None and type(frozen) is generators.GeneratorState:
        known.append((frozen, generators.thaw_into(frozen, env._np_random)))
    copier = _Copier(known, keep=False, seed=seed)
    return {name: copier.attribute(name, attributes[name]) for name in sorted(attributes)}, copier.met


def _put_data(windows: _Windows, taken: Simulation) -> None:
    """Makes `MjData` what it was."""
    import mujoco

    model, data = windows.model, windows.data
    for name in ("geom", "geom1", "geom2"):
        ids = taken.contacts.get(name)
        if ids is not None and ((ids < -1) | (ids >= model.ngeom)).any():
            raise ValueError(f"the snapshot is damaged: contacts name bodies beyond the {model.ngeom} of this model")
    mujoco.mj_resetData(model, data)  # empties the arena
    windows.set_integration(taken.integration)
    _overlay(windows, taken)
    for _ in range(len(taken.contacts.get("dist", ()))):
        mujoco.mj_addContact(model, data, mujoco.MjContact())
    contact = data.contact
    for name, value in taken.contacts.items():
        getattr(contact, name)[...] = value
    if taken.rows:
        data.qpos[:] = _positions_with_rows(model, taken)
        mujoco.mj_makeConstraint(model, data)
        made = {name: array for name in windows.rows if _is_there(array := getattr(data, name))}
        if {n: array.shape for n, array in made.items()} != {n: array.shape for n, array in taken.rows.items()}:
            raise SnapshotUnsupportedError(
                "MuJoCo does not lay out the same constraints again; wrap the environment in trace_envs.Replayable(env)"
            )
        for name, value in taken.rows.items():
            made[name][...] = value
        _overlay(windows, taken)
        for name, value in taken.contacts.items():
            getattr(contact, name)[...] = value


def _overlay(windows: _Windows, taken: Simulation) -> None:
    arrays, data = windows.arrays, windows.data
    for name, value in taken.arrays.items():
        arrays[name][...] = value
    for name, number in taken.numbers.items():
        setattr(data, name, number)


def _positions_with_rows(model: Any, taken: Simulation) -> np.ndarray:
    """Returns joint positions at which the joints at their limits are those of the constraint rows.

    The rows are of the positions before the last integration, which are not known any more. All else that decides which rows
    there are lies in the arrays.
    """
    import mujoco

    qpos = taken.arrays["qpos"].copy()
    limit = int(mujoco.mjtConstraint.mjCNSTR_LIMIT_JOINT)
    distances: dict[int, float] = {}
    for row in np.flatnonzero(taken.rows["efc_type"] == limit):
        distances[int(taken.rows["efc_id"][row])] = float(taken.rows["efc_pos"][row])
    ball = int(mujoco.mjtJoint.mjJNT_BALL)
    for joint in np.flatnonzero(model.jnt_limited):
        low, high = model.jnt_range[joint]
        where, at_limit = model.jnt_qposadr[joint], int(joint) in distances
        if model.jnt_type[joint] == ball:
            angle = max(low, high) - distances[int(joint)] if at_limit else 0.0
            qpos[where : where + 4] = np.cos(angle / 2), np.sin(angle / 2), 0.0, 0.0
        else:
            qpos[where] = low + distances[int(joint)] if at_limit else (low + high) / 2
    return qpos
