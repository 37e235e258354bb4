"""What of a wrapper belongs to the moment: Gymnasium's own by a table, others by their attributes.

Invariant: a wrapper's state is carried whole or refused by name; records of what has happened (statistics of episodes that are
over, recorded frames) and the arguments that a wrapper was made with are no part of it.

A wrapper that is not Gymnasium's may say itself what its state is:

    get_wrapper_state() -> state       returns all that a later step or reset can change, as plain data
    set_wrapper_state(state) -> None   makes it so again; the state is the wrapper's own and may be kept

What is random in such a wrapper has to be drawn from `self.np_random`, the environment's generator, which is restored, and
given new seeds, with the environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.wrappers.utils import RunningMeanStd

from trace_envs.snapshots.adapters import generators
from trace_envs.snapshots.adapters.copying import ATOMS, is_rendering
from trace_envs.snapshots.plain import attributes_of, set_attributes
from trace_envs.snapshots.record import SnapshotUnsupportedError
from trace_envs.snapshots.wrapper_copies import keep, seed_of, use

ELAPSED = "elapsed_seconds"
"""Time that an episode has taken so far, in the state of `RecordEpisodeStatistics`: the only clock in any state."""

Apply = Callable[[], None]

# What every wrapper has, and what Gymnasium works out again when it is asked for.
ALIKE = frozenset({"env", "_action_space", "_observation_space", "_metadata", "_cached_spec", "_saved_kwargs"})


class Kind:
    """How the state of one class of wrappers is taken and put back.

    Attributes:
        hides: Which of "observation" and "reward" may be another outside of the wrapper than inside.
        brings: Whether part of the state may outlive a reset.
        draws: Whether the wrapper may have random generators of its own.
        counts: Whether the wrapper counts turns or rewards.
    """

    hides: frozenset[str] = frozenset({"observation", "reward"})
    brings = True
    draws = False
    counts = False

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Returns the state.

        Raises:
            SnapshotUnsupportedError: Part of it cannot be carried.
        """
        raise NotImplementedError

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Checks a state and makes all copies; what it returns puts the state back, and cannot fail."""
        raise NotImplementedError

    def carried(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Returns the part of the state that a reset leaves as it is."""
        return self.take(wrapper, top)

    def ready_carried(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env) -> Apply:
        """As `ready`, for what `carried` returned."""
        return self.ready(wrapper, state, top, None)

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns turns and return of the episode so far, as far as the wrapper counts them."""
        return None, None


class Known(Kind):
    """A wrapper of Gymnasium's.

    Args:
        state: Attributes that belong to the moment.
        stays: Attributes that do not: arguments, and records of what has happened.
        carries: Which of the state outlive a reset.
        hides: See `Kind`.
    """

    def __init__(self, state: str = "", stays: str = "", carries: str = "", hides: str = ""):
        self.state, self.stays = tuple(state.split()), frozenset(stays.split())
        self.carries, self.hides = tuple(carries.split()), frozenset(hides.split())
        self.brings = bool(self.carries)
        self.known = self.stays | {*self.state}

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes; running means become their three numbers."""
        return self._taken(wrapper, self.state, top)

    def _taken(self, wrapper: gym.Wrapper, names: tuple[str, ...], top: gym.Env) -> dict[str, Any]:
        own = wrapper.__dict__
        values = {}
        try:
            for name in names:
                values[name] = own[name]
        except KeyError as error:
            raise _other_release(wrapper, f"has no attribute {error}") from None
        for value in values.values():
            if type(value) not in ATOMS:
                plain = {n: dict(vars(v)) if isinstance(v, RunningMeanStd) else v for n, v in values.items()}
                return keep(wrapper, plain, top)
        return values

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Checks that the names are those of this release."""
        return self._ready(wrapper, state, self.state, top)

    def _ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], names: tuple[str, ...], top: gym.Env) -> Apply:
        own = wrapper.__dict__
        if state.keys() != set(names):
            raise ValueError(
                f"the snapshot's state of the wrapper {type(wrapper).__name__} holds {sorted(state)}, this release of "
                f"Gymnasium ({gym.__version__}) keeps {sorted(names)}; restore it with the release that it was taken with"
            )
        values, _ = use(wrapper, state, top)
        for name in names:
            if name not in own:
                raise _other_release(wrapper, f"has no attribute {name!r}")
            if isinstance(own[name], RunningMeanStd):
                mean = object.__new__(type(own[name]))
                vars(mean).update(values[name])
                values[name] = mean
        return lambda: own.update(values)

    def carried(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes that outlive a reset."""
        return self._taken(wrapper, self.carries, top) if self.carries else {}

    def ready_carried(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env) -> Apply:
        """As `ready`."""
        return self._ready(wrapper, state, self.carries, top)


class Limit(Known):
    """`TimeLimit`, which counts turns."""

    counts = True

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns its count."""
        return wrapper._elapsed_steps, None  # type: ignore[attr-defined]


class Statistics(Known):
    """`RecordEpisodeStatistics`: the episode's return, length and time so far; when it began is worked out again."""

    counts = True

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Adds the time that the episode has taken, `None` before the first one."""
        state = super().take(wrapper, top)
        try:
            start: float = wrapper.episode_start_time  # type: ignore[attr-defined]
        except AttributeError as error:
            raise _other_release(wrapper, f"({error})") from None
        state[ELAPSED] = time.perf_counter() - start if start != -1 else None
        return state

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Puts the beginning of the episode so far back from now."""
        state = dict(state)
        elapsed = state.pop(ELAPSED, None)
        if not isinstance(elapsed, float | None):
            raise ValueError(
                f"{ELAPSED} in the snapshot's state of RecordEpisodeStatistics is no number: {elapsed!r:.40}"
            )
        put = super().ready(wrapper, state, top, seed)

        def apply() -> None:
            put()
            wrapper.episode_start_time = -1 if elapsed is None else time.perf_counter() - elapsed  # type: ignore[attr-defined]

        return apply

    def counted(self, wrapper: gym.Wrapper) -> tuple[int | None, float | None]:
        """Returns its counts."""
        return wrapper.episode_lengths, float(wrapper.episode_returns)  # type: ignore[attr-defined]


class Checker(Known):
    """`PassiveEnvChecker` looks at the first calls and compares what they return; a restored environment has had them."""

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Ends the comparison under way."""
        super().ready(wrapper, state, top, seed)
        done = {"checked_reset": True, "checked_step": True, "checked_data_reuse": True, "_previous_data": None}
        own = wrapper.__dict__
        return lambda: own.update({name: value for name, value in done.items() if name in own})


class Protocol(Kind):
    """A wrapper with `get_wrapper_state()` and `set_wrapper_state(state)`."""

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies what the wrapper says."""
        return keep(wrapper, {"state": wrapper.get_wrapper_state()}, top)  # type: ignore[attr-defined]

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Copies it again for the wrapper."""
        if set(state) != {"state"}:
            raise _not_of(wrapper, state)
        values, _ = use(wrapper, state, top)
        return lambda: wrapper.set_wrapper_state(values["state"])  # type: ignore[attr-defined]


class Unknown(Kind):
    """Any other wrapper: all of its attributes but spaces (of these, their generators) and windows.

    Args:
        base: What is known of the class of Gymnasium's that it is derived from.
    """

    draws = True

    def __init__(self, base: Known | None):
        self.base = base if base is not None else Known()
        self.left_out = ALIKE | self.base.known

    def _own(self, wrapper: gym.Wrapper) -> tuple[dict[str, Any], dict[str, gym.Space]]:
        """Returns attributes and spaces."""
        found = attributes_of(wrapper)
        spaces = {n: v for n, v in found.items() if isinstance(v, gym.Space)}
        rest = {n: v for n, v in found.items() if n not in self.left_out and n not in spaces and not is_rendering(v)}
        return rest, spaces

    def take(self, wrapper: gym.Wrapper, top: gym.Env) -> dict[str, Any]:
        """Copies the attributes."""
        rest, spaces = self._own(wrapper)
        states = {name: generators.space_states(space) for name, space in spaces.items()}
        used = {name: state for name, state in states.items() if any(part is not None for part in state)}
        return self.base.take(wrapper, top) | keep(wrapper, rest, top) | used

    def ready(self, wrapper: gym.Wrapper, state: Mapping[str, Any], top: gym.Env, seed: int | None) -> Apply:
        """Copies them again; attributes that the wrapper did not have then are removed."""
        own, own_spaces = self._own(wrapper)
        of_base = {name: value for name, value in state.items() if name in self.base.state or name == ELAPSED}
        spaces = {name: value for name, value in state.items() if name in own_spaces}
        rest = {name: value for name, value in state.items() if name not in of_base and name not in spaces}
        if rest.keys() & self.left_out:
            raise _not_of(wrapper, state)
        put = self.base.ready(wrapper, of_base, top, seed)
        index = _index(wrapper, top)
        own_seed = None if seed is None else seed_of(seed, index)
        values, used = use(wrapper, rest, top, own_seed)

        def apply() -> None:
            put()
            for name in own.keys() - values.keys():
                object.__delattr__(wrapper, name)
            set_attributes(wrapper, values)
            met = used
            for name in sorted(spaces):
                met = generators.set_space_states(own_spaces[name], spaces[name], own_seed, met)

        return apply


def _other_release(wrapper: gym.Wrapper, what: str) -> SnapshotUnsupportedError:
    return SnapshotUnsupportedError(
        f"the wrapper {type(wrapper).__name__} of Gymnasium {gym.__version__} {what}, so its state cannot be carried; use a "
        f"release from 1.1 on that trace_envs is tested with, or remove the wrapper from the stack"
    )


def _not_of(wrapper: gym.Wrapper, state: Mapping[str, Any]) -> ValueError:
    cls = type(wrapper)
    return ValueError(
        f"the snapshot's state of the wrapper {cls.__name__} holds {sorted(state)}, which is not what "
        f"{cls.__module__}.{cls.__qualname__} keeps; restore it into the wrapper that it was taken from"
    )


def _index(wrapper: gym.Wrapper, top: gym.Env) -> int:
    """Returns a wrapper's place in its stack, from inside: the same whatever is around it."""
    index = 0
    env: gym.Env = wrapper
    while isinstance(env, gym.Wrapper):
        env, index = env.env, index + 1
    return index


_BOTH = "observation reward"
_PREPROCESSING = "noop_max frame_skip screen_size terminal_on_life_loss grayscale_obs grayscale_newaxis scale_obs"
_TIME = "flatten normalize_time max_timesteps _time_preprocess_func _append_data_func _obs_postprocess_func"
_VIDEO = (
    "episode_trigger step_trigger disable_logger gc_trigger video_folder frames_per_sec name_prefix _video_name "
    "video_length recording recorded_frames render_history step_id episode_id metadata"
)
_GRID = "func low high n_dims multidiscrete bins"
_ARRAYS = "_env_xp _target_xp _env_device _target_device device"
_LOG = "episode_count episode_start_time time_queue return_queue length_queue _stats_key"

KNOWN: dict[str, Known] = {
    "TimeLimit": Limit("_elapsed_steps", "_max_episode_steps"),
    "OrderEnforcing": Known("_has_reset", "_disable_render_order_enforcing"),
    "PassiveEnvChecker": Checker(
        "", "checked_reset checked_step checked_render close_called checked_data_reuse _previous_data"
    ),
    "Autoreset": Known("autoreset"),
    "RecordEpisodeStatistics": Statistics("episode_returns episode_lengths", _LOG),
    "DelayObservation": Known("observation_queue", "delay", hides="observation"),
    "TimeAwareObservation": Known("timesteps", _TIME, hides="observation"),
    "FrameStackObservation": Known(
        "obs_queue padding_value stacked_obs", "stack_size padding_type", hides="observation"
    ),
    "NormalizeObservation": Known(
        "obs_rms _update_running_mean", "epsilon", "obs_rms _update_running_mean", "observation"
    ),
    "NormalizeReward": Known(
        "return_rms discounted_reward _update_running_mean",
        "gamma epsilon",
        "return_rms discounted_reward _update_running_mean",
        "reward",
    ),
    # An episode that ends within the first steps shows frames of the one before.
    "MaxAndSkipObservation": Known("_obs_buffer", "_skip", "_obs_buffer", _BOTH),
    "AtariPreprocessing": Known("obs_buffer lives game_over", _PREPROCESSING, hides=_BOTH),
    "StickyAction": Known(
        "last_action is_sticky_actions num_repeats repeats_taken",
        "repeat_action_probability repeat_action_duration_range repeat_action_duration",
    ),
    "RepeatAction": Known("", "num_repeats", hides=_BOTH),
    "TransformAction": Known("", "func"),
    "ClipAction": Known("", "func"),
    "RescaleAction": Known("", "func min_action max_action"),
    "DiscretizeAction": Known("", f"{_GRID} bin_centers"),
    "TransformReward": Known("", "func", hides="reward"),
    "ClipReward": Known("", "func", hides="reward"),
    "TransformObservation": Known("", "func", hides="observation"),
    "FilterObservation": Known("", "func filter_keys", hides="observation"),
    "FlattenObservation": Known("", "func", hides="observation"),
    "GrayscaleObservation": Known("", "func keep_dim", hides="observation"),
    "ResizeObservation": Known("", "func shape cv2_shape", hides="observation"),
    "ReshapeObservation": Known("", "func shape", hides="observation"),
    "RescaleObservation": Known("", "func", hides="observation"),
    "DtypeObservation": Known("", "func dtype", hides="observation"),
    "AddRenderObservation": Known("", "func", hides="observation"),
    "DiscretizeObservation": Known("", f"{_GRID} bin_edges", hides="observation"),
    "ArrayConversion": Known("", _ARRAYS, hides=_BOTH),
    "JaxToNumpy": Known("", _ARRAYS, hides=_BOTH),
    "JaxToTorch": Known("", _ARRAYS, hides=_BOTH),
    "NumpyToTorch": Known("", _ARRAYS, hides=_BOTH),
    # Frames are a record of what was shown; what noise they get is drawn from the environment's generator.
    "RenderCollection": Known("", "frame_list pop_frames reset_clean"),
    "RecordVideo": Known("", _VIDEO),
    "HumanRendering": Known("", "screen_size window clock"),
    "AddWhiteNoise": Known("", "probability_of_noise_per_pixel is_noise_grayscale"),
    "ObstructView": Known("", "obstruction_centers_ratio obstruction_width is_noise_grayscale"),
}
"""Gymnasium's wrappers by name, as of releases 1.1 to 1.4."""

_KINDS: dict[type, Kind] = {}


def kind_of(wrapper: gym.Wrapper) -> Kind:
    """Returns how a wrapper's state is taken and put back."""
    kind = _KINDS.get(type(wrapper))
    return _found(wrapper) if kind is None else kind


def _found(wrapper: gym.Wrapper) -> Kind:
    cls = type(wrapper)
    kind: Kind
    bases = [
        base for base in cls.__mro__ if base.__module__.startswith("gymnasium.wrappers.") and base.__name__ in KNOWN
    ]
    known = KNOWN[bases[0].__name__] if bases else None
    if callable(getattr(cls, "get_wrapper_state", None)) and callable(getattr(cls, "set_wrapper_state", None)):
        kind = Protocol()
    # Another release may have given a wrapper attributes that the table does not know.
    elif known is not None and bases[0] is cls and vars(wrapper).keys() <= ALIKE | known.known:
        kind = known
    else:
        kind = Unknown(known)
    _KINDS[cls] = kind
    return kind


def split(env: gym.Env) -> tuple[list[gym.Wrapper], gym.Env]:
    """Returns the wrappers of a stack, outermost first, and what they stand around."""
    wrappers = []
    while isinstance(env, gym.Wrapper) and not is_native(type(env)):
        wrappers.append(env)
        env = env.env
    return wrappers, env


def carried_state(env: gym.Env) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """Returns what the wrappers of a stack bring along from earlier episodes into the next, outermost first.

    Empty where none can bring anything; `NormalizeObservation`, `NormalizeReward`, `MaxAndSkipObservation` and wrappers that
    are not Gymnasium's can.

    Raises:
        SnapshotUnsupportedError: A wrapper's state cannot be carried.
    """
    wrappers = _wrappers_of(env)
    if not any(kind_of(wrapper).brings for wrapper in wrappers):
        return ()
    return tuple([(type(wrapper).__name__, kind_of(wrapper).carried(wrapper, env)) for wrapper in wrappers])


def restore_carried(env: gym.Env, carried: tuple[tuple[str, Mapping[str, Any]], ...]) -> None:
    """Gives the wrappers of a stack what `carried_state` returned, before a reset; all of them or none.

    Raises:
        ValueError: It was taken from another stack.
    """
    wrappers = _wrappers_of(env) if any(kind_of(wrapper).brings for wrapper in _wrappers_of(env)) else []
    names, expected = [type(wrapper).__name__ for wrapper in wrappers], [name for name, _ in carried]
    if names != expected:
        raise ValueError(
            f"the state was brought along by the wrappers {expected or 'none'}, this environment has {names or 'none'} that "
            f"could; give it to a stack like the one that it is of"
        )
    applies = [
        kind_of(wrapper).ready_carried(wrapper, state, env)
        for wrapper, (_, state) in zip(wrappers, carried, strict=True)
    ]
    for apply in applies:
        apply()


def _wrappers_of(env: gym.Env) -> list[gym.Wrapper]:
    """Returns the wrappers of a stack whose state nobody else carries from episode to episode."""
    found = []
    while isinstance(env, gym.Wrapper):
        if not is_native(type(env)):
            found.append(env)
        env = env.env
    return found


_NATIVE: dict[type, bool] = {}


def is_native(cls: type) -> bool:
    """Says whether a class has `snapshot()` and `restore(snapshot, *, seed=None)` of its own."""
    known = _NATIVE.get(cls)
    if known is None:
        known = callable(getattr(cls, "snapshot", None)) and callable(getattr(cls, "restore", None))
        _NATIVE[cls] = known
    return known
