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

from collections.abc import Mapping
from typing import Any

import gymnasium as gym

from trace_envs.snapshots.wrapper_kinds import ALIKE, Checker, Kind, Known, Limit, Protocol, Statistics, Unknown

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

# By class; and how many attributes an instance has, if it has only those that the table knows.
_KINDS: dict[type, tuple[Kind, int | None]] = {}


def kind_of(wrapper: gym.Wrapper) -> Kind:
    """Returns how a wrapper's state is taken and put back."""
    kind, size = _KINDS.get(type(wrapper)) or _learn(wrapper)
    if size is None or len(wrapper.__dict__) == size:
        return kind
    # Somebody has given this one an attribute, or taken one from it.
    assert isinstance(kind, Known)
    return kind if wrapper.__dict__.keys() <= ALIKE | kind.known else Unknown(kind)


def _learn(wrapper: gym.Wrapper) -> tuple[Kind, int | None]:
    cls = type(wrapper)
    found: tuple[Kind, int | None]
    bases = [
        base for base in cls.__mro__ if base.__module__.startswith("gymnasium.wrappers.") and base.__name__ in KNOWN
    ]
    known = KNOWN[bases[0].__name__] if bases else None
    if callable(getattr(cls, "get_wrapper_state", None)) and callable(getattr(cls, "set_wrapper_state", None)):
        found = Protocol(), None
    elif known is not None and bases[0] is cls:
        found = known, len(vars(wrapper).keys() & (ALIKE | known.known))
    else:
        found = Unknown(known), None
    _KINDS[cls] = found
    return found


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
