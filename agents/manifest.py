"""A folder that knows what it should hold: the size and SHA-256 of each file, and the digest of that list itself.

Invariant: what `check_files` passes is, file by file and byte by byte, what `write_manifest` saw; nothing is parsed before its
digest was checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
"""Digest of the manifest, in the form of `sha256sum`."""


class ManifestError(ValueError):
    """A folder is not what its manifest says; the message is a reason without the folder's name."""


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        header: Plain data about the folder as a whole.
        files: Size in bytes and SHA-256 in hexadecimal of each file, by its path in the folder.
    """

    header: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]


def write_manifest(folder: Path, header: Mapping[str, Any]) -> None:
    """Writes `manifest.json` and `manifest.sha256` for all other files that a folder holds now, replacing earlier ones.

    Args:
        folder: The folder.
        header: Plain data to keep with it.
    """
    files = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in _files(folder).items()}
    text = json.dumps({"header": dict(header), "files": files}, indent=1).encode()
    (folder / MANIFEST).write_bytes(text)
    (folder / DIGEST).write_text(f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n")


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a folder, itself checked by its digest; the files that it lists are not looked at.

    Raises:
        ManifestError: The manifest is missing, cut short or altered.
    """
    try:
        text, digest = (folder / MANIFEST).read_bytes(), (folder / DIGEST).read_bytes()
    except FileNotFoundError as error:
        raise ManifestError(
            f"it has no {Path(error.filename).name}, so it is incomplete or of an early release"
        ) from error
    except OSError as error:
        raise ManifestError(f"its manifest cannot be read ({error})") from error
    if digest != f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode():
        raise ManifestError(f"its {MANIFEST} was cut short or altered: it does not have the digest in {DIGEST}")
    try:
        record = json.loads(text)
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        return Manifest(dict(record["header"]), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"its {MANIFEST} is no manifest ({type(error).__name__}: {error})") from error


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the files of a folder with its manifest.

    Raises:
        ManifestError: A file is missing, added, of another size or altered; the first such is named.
    """
    try:
        found = _files(folder)
        for name, (size, digest) in manifest.files.items():
            if name not in found:
                raise ManifestError(f"its file {name} is missing")
            if (now := found[name].stat().st_size) != size:
                raise ManifestError(f"its file {name} has {now:,} bytes, {size:,} were written")
            if _sha256(found[name]) != digest:
                raise ManifestError(f"its file {name} was altered: it does not have the digest in {MANIFEST}")
    except OSError as error:
        raise ManifestError(f"its files cannot be read ({error})") from error
    if added := sorted(found.keys() - manifest.files.keys()):
        raise ManifestError(f"its file {added[0]} is not in {MANIFEST}, so it was added; move it elsewhere")


def _files(folder: Path) -> dict[str, Path]:
    """Returns all files of a folder and of those in it by path, but for the manifest's own two."""
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if not p.is_dir()}
    return {name: path for name, path in found.items() if name not in (MANIFEST, DIGEST)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
