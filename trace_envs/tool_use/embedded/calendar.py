"""The world of a calendar: events at whole hours of the week, and rooms that can be booked.

Data: `{"events": {id: {"title", "day", "hour"}}, "rooms": {room: [[day, hour], ...]}}`, the bookings in order.
"""

from __future__ import annotations

from typing import Literal

from trace_envs.functions import ToolError
from trace_envs.tool_use.embedded.records import Data, Domain, Kind, Names, Request, Step, call

Day = Literal["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
HOURS = range(8, 18)


def _check_hour(hour: int) -> None:
    if hour not in HOURS:
        raise ToolError(f"hours go from {HOURS[0]} to {HOURS[-1]}")


def _event(world: Data, event_id: str) -> dict[str, object]:
    if event_id not in world["events"]:
        raise ToolError(f"there is no event {event_id}")
    return world["events"][event_id]


def list_events(world: Data, day: Day) -> tuple[Data, str]:
    """Lists the events of a day: id, hour and title."""
    found = sorted((e["hour"], i, e["title"]) for i, e in world["events"].items() if e["day"] == day)
    return world, ", ".join(f"{i} {title} at {hour}" for hour, i, title in found) or "none"


def find_event(world: Data, title: str) -> tuple[Data, str]:
    """Returns id, day and hour of an event."""
    for name, event in world["events"].items():
        if event["title"] == title:
            return world, f"{name} is on {event['day']} at {event['hour']}"
    raise ToolError(f"there is no event {title}")


def add_event(world: Data, title: str, day: Day, hour: int) -> tuple[Data, str]:
    """Adds an event."""
    _check_hour(hour)
    name = f"e{max((int(i[1:]) for i in world['events']), default=0) + 1}"
    event = {"title": title, "day": day, "hour": hour}
    return {**world, "events": {**world["events"], name: event}}, f"added {name} on {day} at {hour}"


def move_event(world: Data, event_id: str, day: Day, hour: int) -> tuple[Data, str]:
    """Moves an event to another day and hour."""
    _check_hour(hour)
    event = {**_event(world, event_id), "day": day, "hour": hour}
    return {**world, "events": {**world["events"], event_id: event}}, f"moved {event_id} to {day} at {hour}"


def cancel_event(world: Data, event_id: str) -> tuple[Data, str]:
    """Cancels an event."""
    _event(world, event_id)
    left = {i: e for i, e in world["events"].items() if i != event_id}
    return {**world, "events": left}, f"cancelled {event_id}"


def free_rooms(world: Data, day: Day, hour: int) -> tuple[Data, str]:
    """Lists the rooms that are free at an hour."""
    _check_hour(hour)
    return world, ", ".join(r for r, taken in world["rooms"].items() if [day, hour] not in taken) or "none"


def book_room(world: Data, room: str, day: Day, hour: int) -> tuple[Data, str]:
    """Books a room for an hour."""
    _check_hour(hour)
    if room not in world["rooms"]:
        raise ToolError(f"there is no room {room}")
    if [day, hour] in world["rooms"][room]:
        raise ToolError(f"{room} is taken on {day} at {hour}")
    taken = sorted([*world["rooms"][room], [day, hour]])
    return {**world, "rooms": {**world["rooms"], room: taken}}, f"booked {room} on {day} at {hour}"


def _time(names: Names) -> tuple[str, int]:
    return names.pick(DAYS), names.pick(HOURS)


def _some_event(data: Data, names: Names) -> tuple[str, dict[str, object]] | None:
    return names.pick(list(data["events"].items())) if data["events"] else None


def _add(data: Data, names: Names) -> Request | None:
    title, (day, hour) = names(), _time(names)
    return Request(
        f"Add an event {title} on {day} at {hour}.",
        (Step(f"Add {title}.", call("add_event", title=title, day=day, hour=hour)),),
        vague=f"Add an event {title} on {day}.",
        detail=f"At {hour}.",
    )


def _when(data: Data, names: Names) -> Request | None:
    if (found := _some_event(data, names)) is None:
        return None
    event = found[1]
    when = f"{event['day']} at {event['hour']}"
    return Request(
        f"When is {event['title']}?",
        (Step(f"Find {event['title']}.", call("find_event", title=event["title"])),),
        reply=f"It is on {when}.",
        mention=when,
    )


def _cancel(data: Data, names: Names) -> Request | None:
    if (found := _some_event(data, names)) is None:
        return None
    name, event = found
    return Request(
        f"Cancel the event {event['title']}.",
        (
            Step(f"Find {event['title']}.", call("find_event", title=event["title"])),
            Step(f"It is {name}.", call("cancel_event", event_id=name)),
        ),
        vague="Cancel an event.",
        detail=f"The event {event['title']}.",
    )


def _move(data: Data, names: Names) -> Request | None:
    if (found := _some_event(data, names)) is None:
        return None
    (name, event), (day, hour) = found, _time(names)
    return Request(
        f"Move the event {event['title']} to {day} at {hour}.",
        (
            Step(f"Find {event['title']}.", call("find_event", title=event["title"])),
            Step(f"It is {name}.", call("move_event", event_id=name, day=day, hour=hour)),
        ),
        vague=f"Move the event {event['title']} to {day}.",
        detail=f"At {hour}.",
    )


def _first_free(data: Data, day: str, hour: int) -> str | None:
    return next((room for room, taken in data["rooms"].items() if [day, hour] not in taken), None)


def _book(data: Data, names: Names) -> Request | None:
    day, hour = _time(names)
    if (room := _first_free(data, day, hour)) is None:
        return None
    return Request(
        f"Book the first free room on {day} at {hour}.",
        (
            Step("See what is free.", call("free_rooms", day=day, hour=hour)),
            Step(f"Take {room}.", call("book_room", room=room, day=day, hour=hour)),
        ),
        reply=f"It is {room}.",
        mention=room,
        vague=f"Book the first free room on {day}.",
        detail=f"At {hour}.",
    )


def _book_for(data: Data, names: Names) -> Request | None:
    if (found := _some_event(data, names)) is None:
        return None
    _, event = found
    day, hour = str(event["day"]), int(event["hour"])  # type: ignore[call-overload]
    if (room := _first_free(data, day, hour)) is None:
        return None
    return Request(
        f"Book the first free room for the event {event['title']}.",
        (
            Step(f"Find {event['title']}.", call("find_event", title=event["title"])),
            Step(f"It is on {day} at {hour}.", call("free_rooms", day=day, hour=hour)),
            Step(f"Take {room}.", call("book_room", room=room, day=day, hour=hour)),
        ),
        reply=f"It is {room}.",
        mention=room,
        vague="Book the first free room for an event.",
        detail=f"For {event['title']}.",
    )


def _data(names: Names, noise: int) -> Data:
    ids = names.rng.choice(90, size=2 + noise, replace=False) + 10
    events = {}
    for i in ids:
        day, hour = _time(names)
        events[f"e{i}"] = {"title": names(), "day": day, "hour": hour}
    rooms = {names(): sorted([list(_time(names)) for _ in range(noise)]) for _ in range(2 + noise // 2)}
    # An hour that is drawn twice is one booking.
    return {
        "events": events,
        "rooms": {r: [b for i, b in enumerate(taken) if b not in taken[:i]] for r, taken in rooms.items()},
    }


CALENDAR = Domain(
    "calendar",
    (list_events, find_event, add_event, move_event, cancel_event, free_rooms, book_room),
    _data,
    (Kind(1, _add), Kind(1, _when), Kind(2, _cancel), Kind(2, _move), Kind(2, _book), Kind(3, _book_for)),
)
