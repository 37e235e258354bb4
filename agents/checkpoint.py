"""Checkpoints: everything that a run needs to go on as if it had never stopped.

Invariant: at every moment of saving, whatever stops it, the directory holds what it held before or the new checkpoint whole. A
checkpoint is written under another name, flushed to disk and renamed; one that it replaces is set aside and removed last.
One that is not as it was written is never used, counted or removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from agents.manifest import Manifest, ManifestError, check_files, read_manifest, write_manifest
from agents.state_file import read_state, write_state

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_WRITING, _REPLACED, _REMOVING = ".writing-", ".replaced-", ".removing-"
_REFUSED = "refused-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or used; the message names it and says why."""


@dataclass(frozen=True)
class Loaded:
    """A checkpoint that was read.

    Attributes:
        path: Its directory, which is also a model folder.
        update: Policy updates done.
        state: What `save_checkpoint` was given.
    """

    path: Path
    update: int
    state: dict[str, Any]


def save_checkpoint(
    directory: Path,
    update: int,
    model: Any,
    tokenizer: Any,
    state: Mapping[str, Any],
    *,
    keep: int = 2,
    fingerprint: str = "",
) -> Path:
    """Writes a checkpoint, and removes older ones of the same run when there are more than enough.

    Args:
        directory: Where checkpoints live; the new one is `update-<number>` in it.
        update: Number of policy updates done.
        model: Saved as a transformers folder, so that a checkpoint can be loaded like any model.
        tokenizer: Saved beside it.
        state: Arrays and plain data, nested; see `agents.state_file`.
        keep: How many checkpoints stay, at least 1. Those that cannot be used do not count and are left alone.
        fingerprint: Digest of the settings that must not change on resuming.

    Returns:
        The checkpoint's directory.

    Raises:
        CheckpointError: It cannot be written, for instance because the disk is full; earlier ones are as they were.
        TypeError: The state holds something that a checkpoint cannot keep.
    """
    final, temporary = directory / f"update-{update:06d}", directory / f"{_WRITING}{update:06d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _tidy(directory)
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            write_state(temporary, state)
            write_manifest(temporary, {"version": FORMAT_VERSION, "update": update, "fingerprint": fingerprint})
            _sync_tree(temporary)
        except Exception:  # an interrupt, too, may leave it: the next save removes it
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _install(temporary, final, fingerprint)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {final} cannot be written ({error}); those before it are kept: make room for it and see that "
            f"the directory can be written to, then go on with --resume"
        ) from error
    _retain(directory, final, keep, fingerprint)
    return final


def load_latest(directory: Path, fingerprint: str) -> Loaded:
    """Reads the latest checkpoint that can be used; each later one that cannot is named in a warning. Nothing is written.

    Args:
        directory: Where checkpoints live.
        fingerprint: That of the run which goes on.

    Raises:
        CheckpointError: There is none; if some were refused, each is listed with its reason.
    """
    refused: list[str] = []
    for path in _candidates(directory):
        try:
            loaded = load_checkpoint(path, fingerprint)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        for message in refused:
            logger.warning("%s; going on from %s instead", message, path.name)
        return loaded
    if refused:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(refused))
    raise CheckpointError(f"there is no checkpoint in {directory}; start the run anew, without --resume")


def load_checkpoint(path: Path, fingerprint: str | None = None) -> Loaded:
    """Reads one checkpoint, every file of it checked before it is parsed.

    Args:
        path: Its directory.
        fingerprint: That of the run which goes on; `None` for any.

    Raises:
        CheckpointError: It was cut short or altered, or is of another version or run.
    """
    try:
        manifest = _checked(path, fingerprint)
        return Loaded(path, int(manifest.header["update"]), read_state(path))
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {path} is refused: {error}") from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Returns the checkpoints by name, oldest first, usable or not."""
    found = {
        int(m[1]): p for p in directory.glob("update-*") if (m := re.fullmatch(r"update-(\d+)", p.name)) and p.is_dir()
    }
    return [found[update] for update in sorted(found)]


def _candidates(directory: Path) -> list[Path]:
    """Returns all that may be used, the best first: by update, and one that was set aside after the one in its place."""
    asides = {int(m[1]): p for p in directory.glob(f"{_REPLACED}*") if (m := re.fullmatch(r"\.replaced-(\d+)", p.name))}
    finals = {_update(p): p for p in list_checkpoints(directory)}
    return [
        by[update] for update in sorted({*finals, *asides}, reverse=True) for by in (finals, asides) if update in by
    ]


def _update(path: Path) -> int:
    return int(path.name.rsplit("-", 1)[1])


def _checked(path: Path, fingerprint: str | None) -> Manifest:
    """Returns the manifest of a checkpoint that can be used.

    Raises:
        ManifestError: It cannot; the message is the reason.
    """
    manifest = read_manifest(path)
    header = manifest.header
    if header.get("version") != FORMAT_VERSION:
        raise ManifestError(f"it has version {header.get('version')}, this release reads version {FORMAT_VERSION}")
    if header.get("update") != _update(path):
        raise ManifestError(f"it is of update {header.get('update')}, so it was renamed")
    if fingerprint is not None and header.get("fingerprint") != fingerprint:
        raise ManifestError(
            f"it is of another run: its settings have the digest {header.get('fingerprint')!r}, those of this run have "
            f"{fingerprint!r}"
        )
    check_files(path, manifest)
    return manifest


def _usable(path: Path, fingerprint: str) -> bool:
    try:
        _checked(path, fingerprint)
    except ManifestError:
        return False
    return True


def _tidy(directory: Path) -> None:
    """Removes what a stopped save left unfinished, and puts back what it had set aside."""
    for pattern in (f"{_WRITING}*", f"{_REMOVING}*"):
        for stale in directory.glob(pattern):
            shutil.rmtree(stale)
    for aside in directory.glob(f"{_REPLACED}*"):
        final = directory / f"update-{aside.name.removeprefix(_REPLACED)}"
        if not final.exists():
            os.replace(aside, final)


def _install(temporary: Path, final: Path, fingerprint: str) -> None:
    """Gives a checkpoint that is on disk its name; what had that name before is set aside."""
    directory, aside = final.parent, final.with_name(final.name.replace("update-", _REPLACED))
    if final.exists() and not _usable(final, fingerprint):
        kept = next(p for i in range(1, 10**6) if not (p := directory / f"{_REFUSED}{final.name}-{i}").exists())
        logger.warning(
            "the checkpoint %s cannot be used; it makes room for a new one and is kept as %s", final, kept.name
        )
        os.replace(final, kept)
    elif final.exists():
        if aside.exists():
            shutil.rmtree(aside)  # the one in its place can be used
        os.replace(final, aside)
    try:
        os.replace(temporary, final)
    except OSError:
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        raise
    _sync(directory)
    _sync(directory.parent)


def _retain(directory: Path, newest: Path, keep: int, fingerprint: str) -> None:
    """Removes usable checkpoints of this run beyond the last few, and those that were replaced."""
    good = 1
    gone = [directory / newest.name.replace("update-", _REPLACED)]
    for path in reversed(list_checkpoints(directory)):
        if path != newest and _usable(path, fingerprint):
            good += 1
            gone += [path] if good > keep else [directory / path.name.replace("update-", _REPLACED)]
    for path in gone:
        if path.exists():
            # Renamed first, so that a kill in the middle leaves nothing that looks like a damaged checkpoint.
            removing = directory / f"{_REMOVING}{path.name.lstrip('.')}"
            try:
                os.replace(path, removing)
                shutil.rmtree(removing)
            except OSError as error:
                logger.warning("the old checkpoint %s cannot be removed (%s)", path, error)


def _sync_tree(folder: Path) -> None:
    """Flushes all files of a folder to disk, and then the folders."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        # A failed close of what was only read loses nothing.
        with contextlib.suppress(OSError):
            os.close(descriptor)
