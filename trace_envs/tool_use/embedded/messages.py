"""The world of messages: contacts with numbers, an inbox and what was sent.

Data: `{"contacts": {name: number}, "inbox": {id: {"sender", "text"}}, "sent": {id: {"number", "text"}}}`.
"""

from __future__ import annotations

from trace_envs.functions import ToolError
from trace_envs.tool_use.embedded.records import Data, Domain, Kind, Names, Request, Step, call


def find_contact(world: Data, name: str) -> tuple[Data, str]:
    """Returns the number of a contact."""
    if name not in world["contacts"]:
        raise ToolError(f"there is no contact {name}")
    return world, f"{name} has number {world['contacts'][name]}"


def add_contact(world: Data, name: str, number: int) -> tuple[Data, str]:
    """Adds a contact, or changes the number of one."""
    return {**world, "contacts": {**world["contacts"], name: number}}, f"{name} has number {number} now"


def delete_contact(world: Data, name: str) -> tuple[Data, str]:
    """Deletes a contact."""
    find_contact(world, name)
    return {
        **world,
        "contacts": {other: number for other, number in world["contacts"].items() if other != name},
    }, f"deleted {name}"


def send_message(world: Data, number: int, text: str) -> tuple[Data, str]:
    """Sends a message to a number that is a contact's."""
    if number not in world["contacts"].values():
        raise ToolError(f"nobody has number {number}")
    name = f"s{len(world['sent']) + 1}"
    return {**world, "sent": {**world["sent"], name: {"number": number, "text": text}}}, f"sent {text} to {number}"


def list_messages(world: Data, sender: str) -> tuple[Data, str]:
    """Lists the messages that came from somebody: their ids and texts."""
    lines = [f"{i} {m['text']}" for i, m in world["inbox"].items() if m["sender"] == sender]
    if not lines:
        raise ToolError(f"there is no message from {sender}")
    return world, ", ".join(lines)


def delete_message(world: Data, message_id: str) -> tuple[Data, str]:
    """Deletes a message of the inbox."""
    if message_id not in world["inbox"]:
        raise ToolError(f"there is no message {message_id}")
    return {
        **world,
        "inbox": {i: m for i, m in world["inbox"].items() if i != message_id},
    }, f"deleted {message_id}"


def _contact(data: Data, names: Names) -> tuple[str, int] | None:
    return names.pick(list(data["contacts"].items())) if data["contacts"] else None


def _message(data: Data, names: Names) -> tuple[str, str, str] | None:
    """Returns the id, sender and text of a message whose sender has sent no other."""
    senders = [m["sender"] for m in data["inbox"].values()]
    single = [(i, m["sender"], m["text"]) for i, m in data["inbox"].items() if senders.count(m["sender"]) == 1]
    return names.pick(single) if single else None


def _add(data: Data, names: Names) -> Request | None:
    name, number = names(), names.number(10, 99)
    return Request(
        f"Add the contact {name} with number {number}.",
        (Step(f"Add {name}.", call("add_contact", name=name, number=number)),),
        vague=f"Add the contact {name}.",
        detail=f"The number is {number}.",
    )


def _forget(data: Data, names: Names) -> Request | None:
    if (found := _contact(data, names)) is None:
        return None
    return Request(
        f"Delete the contact {found[0]}.",
        (Step(f"Delete {found[0]}.", call("delete_contact", name=found[0])),),
        vague="Delete a contact.",
        detail=f"The contact {found[0]}.",
    )


def _number(data: Data, names: Names) -> Request | None:
    if (found := _contact(data, names)) is None:
        return None
    name, number = found
    return Request(
        f"What is the number of {name}?",
        (Step(f"Find {name}.", call("find_contact", name=name)),),
        reply=f"It is {number}.",
        mention=str(number),
    )


def _send(data: Data, names: Names) -> Request | None:
    if (found := _contact(data, names)) is None:
        return None
    (name, number), text = found, f"{names()} {names()}"
    return Request(
        f"Send {text} to {name}.",
        (
            Step(f"Find {name}.", call("find_contact", name=name)),
            Step(f"It is {number}.", call("send_message", number=number, text=text)),
        ),
        vague=f"Send {text} to somebody.",
        detail=f"To {name}.",
    )


def _clear(data: Data, names: Names) -> Request | None:
    if (found := _message(data, names)) is None:
        return None
    message_id, sender, _ = found
    return Request(
        f"Delete the message from {sender}.",
        (
            Step(f"Look for {sender}.", call("list_messages", sender=sender)),
            Step(f"It is {message_id}.", call("delete_message", message_id=message_id)),
        ),
        vague="Delete a message.",
        detail=f"The one from {sender}.",
    )


def _forward(data: Data, names: Names) -> Request | None:
    found, contact = _message(data, names), _contact(data, names)
    if found is None or contact is None:
        return None
    (_, sender, text), (name, number) = found, contact
    return Request(
        f"Send the message from {sender} on to {name}.",
        (
            Step(f"Look for {sender}.", call("list_messages", sender=sender)),
            Step(f"Find {name}.", call("find_contact", name=name)),
            Step(f"Send {text} to {number}.", call("send_message", number=number, text=text)),
        ),
        vague=f"Send the message from {sender} on to somebody.",
        detail=f"To {name}.",
    )


def _data(names: Names, noise: int) -> Data:
    numbers = names.rng.choice(90, size=2 + noise, replace=False) + 10
    ids = names.rng.choice(90, size=2 + noise, replace=False) + 10
    return {
        "contacts": {names(): int(number) for number in numbers},
        "inbox": {f"m{i}": {"sender": names(), "text": f"{names()} {names()}"} for i in ids},
        "sent": {},
    }


MESSAGES = Domain(
    "messages",
    (find_contact, add_contact, delete_contact, send_message, list_messages, delete_message),
    _data,
    (Kind(1, _add), Kind(1, _forget), Kind(1, _number), Kind(2, _send), Kind(2, _clear), Kind(3, _forward)),
)
