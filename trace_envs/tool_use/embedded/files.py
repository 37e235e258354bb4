"""The world of files: folders with text files in them.

Data: `{"folders": {folder: {file name: text}}}`.
"""

from __future__ import annotations

from trace_envs.functions import ToolError
from trace_envs.tool_use.embedded.records import Data, Domain, Kind, Names, Request, Step, call


def _folder(world: Data, folder: str) -> dict[str, str]:
    if folder not in world["folders"]:
        raise ToolError(f"there is no folder {folder}")
    return world["folders"][folder]


def _file(world: Data, folder: str, name: str) -> str:
    if name not in _folder(world, folder):
        raise ToolError(f"there is no file {name} in {folder}")
    return world["folders"][folder][name]


def _with(world: Data, folder: str, files: dict[str, str]) -> Data:
    return {**world, "folders": {**world["folders"], folder: files}}


def find_file(world: Data, name: str) -> tuple[Data, str]:
    """Says in which folder a file is."""
    for folder, files in world["folders"].items():
        if name in files:
            return world, f"{name} is in {folder}"
    raise ToolError(f"there is no file {name}")


def list_files(world: Data, folder: str) -> tuple[Data, str]:
    """Lists the files of a folder."""
    return world, ", ".join(_folder(world, folder)) or "empty"


def read_file(world: Data, folder: str, name: str) -> tuple[Data, str]:
    """Returns what a file says."""
    return world, _file(world, folder, name)


def write_file(world: Data, folder: str, name: str, text: str) -> tuple[Data, str]:
    """Writes a file, anew if it is there already."""
    return _with(world, folder, {**_folder(world, folder), name: text}), f"wrote {name} in {folder}"


def move_file(world: Data, folder: str, name: str, to: str) -> tuple[Data, str]:
    """Moves a file to another folder.

    Args:
        world: What there is.
        folder: Where it is.
        name: The file.
        to: The folder that it goes to.
    """
    text = _file(world, folder, name)
    _folder(world, to)
    left = {other: content for other, content in world["folders"][folder].items() if other != name}
    world = _with(world, folder, left)
    return _with(world, to, {**world["folders"][to], name: text}), f"moved {name} from {folder} to {to}"


def delete_file(world: Data, folder: str, name: str) -> tuple[Data, str]:
    """Deletes a file."""
    _file(world, folder, name)
    left = {other: content for other, content in world["folders"][folder].items() if other != name}
    return _with(world, folder, left), f"deleted {name} in {folder}"


def make_folder(world: Data, folder: str) -> tuple[Data, str]:
    """Makes an empty folder."""
    if folder in world["folders"]:
        raise ToolError(f"there is a folder {folder} already")
    return _with(world, folder, {}), f"made {folder}"


def _some_file(data: Data, names: Names) -> tuple[str, str] | None:
    full = [folder for folder, files in data["folders"].items() if files]
    if not full:
        return None
    folder = names.pick(full)
    return folder, names.pick(list(data["folders"][folder]))


def _other(data: Data, names: Names, folder: str) -> str | None:
    others = [other for other in data["folders"] if other != folder]
    return names.pick(others) if others else None


def _delete(data: Data, names: Names) -> Request | None:
    if (found := _some_file(data, names)) is None:
        return None
    folder, name = found
    return Request(
        f"Delete the file {name} in {folder}.",
        (Step(f"Delete {name}.", call("delete_file", folder=folder, name=name)),),
        vague=f"Delete a file in {folder}.",
        detail=f"The file {name}.",
    )


def _write(data: Data, names: Names) -> Request | None:
    folder, name, text = names.pick(list(data["folders"])), names(), f"{names()} {names()}"
    return Request(
        f"Write {text} to a file {name} in {folder}.",
        (Step(f"Write {name}.", call("write_file", folder=folder, name=name, text=text)),),
        vague=f"Write {text} to a file {name}.",
        detail=f"In {folder}.",
    )


def _read(data: Data, names: Names) -> Request | None:
    if (found := _some_file(data, names)) is None:
        return None
    folder, name = found
    text = data["folders"][folder][name]
    return Request(
        f"What does {name} in {folder} say?",
        (Step(f"Read {name}.", call("read_file", folder=folder, name=name)),),
        reply=f"It says {text}.",
        mention=text,
    )


def _move(data: Data, names: Names) -> Request | None:
    if (found := _some_file(data, names)) is None or (to := _other(data, names, found[0])) is None:
        return None
    folder, name = found
    return Request(
        f"Move the file {name} to {to}.",
        (
            Step(f"Find {name}.", call("find_file", name=name)),
            Step(f"It is in {folder}.", call("move_file", folder=folder, name=name, to=to)),
        ),
        vague=f"Move the file {name}.",
        detail=f"To {to}.",
    )


def _new_folder(data: Data, names: Names) -> Request | None:
    if (found := _some_file(data, names)) is None:
        return None
    folder, name = found
    to = names()
    return Request(
        f"Make a folder {to} and move {name} from {folder} there.",
        (
            Step(f"Make {to}.", call("make_folder", folder=to)),
            Step(f"Move {name}.", call("move_file", folder=folder, name=name, to=to)),
        ),
    )


def _copy(data: Data, names: Names) -> Request | None:
    if (found := _some_file(data, names)) is None or (to := _other(data, names, found[0])) is None:
        return None
    folder, name = found
    text, new = data["folders"][folder][name], names()
    return Request(
        f"Copy what {name} says to a file {new} in {to}.",
        (
            Step(f"Find {name}.", call("find_file", name=name)),
            Step(f"It is in {folder}.", call("read_file", folder=folder, name=name)),
            Step(f"It says {text}.", call("write_file", folder=to, name=new, text=text)),
        ),
        vague=f"Copy what {name} says to a file {new}.",
        detail=f"In {to}.",
    )


def _data(names: Names, noise: int) -> Data:
    folders = [names() for _ in range(2 + noise // 2)]
    return {
        "folders": {
            folder: {names(): f"{names()} {names()}" for _ in range(names.number(1, 2 + noise))} for folder in folders
        }
    }


FILES = Domain(
    "files",
    (find_file, list_files, read_file, write_file, move_file, delete_file, make_folder),
    _data,
    (Kind(1, _delete), Kind(1, _write), Kind(1, _read), Kind(2, _move), Kind(2, _new_folder), Kind(3, _copy)),
)
