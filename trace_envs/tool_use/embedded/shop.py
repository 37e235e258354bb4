"""The world of a shop: orders, stock, and a policy that the tools do not enforce.

Data: `{"orders": {id: {"customer", "item", "status", "price"}}, "stock": {item: count}, "credit": {customer: money}}`.
"""

from __future__ import annotations

from typing import Any

from trace_envs.functions import ToolError
from trace_envs.tool_use.embedded.records import Data, Domain, Kind, Names, Request, Step, call

POLICY = (
    "Orders are cancelled only while open and returned only when delivered. Whoever returns gets the price as credit."
)
REFUSAL = "That is not allowed."


def _order(world: Data, order_id: str) -> dict[str, Any]:
    if order_id not in world["orders"]:
        raise ToolError(f"there is no order {order_id}")
    return world["orders"][order_id]


def _with_status(world: Data, order_id: str, status: str) -> Data:
    order = {**_order(world, order_id), "status": status}
    return {**world, "orders": {**world["orders"], order_id: order}}


def find_order(world: Data, customer: str) -> tuple[Data, str]:
    """Lists the orders of a customer."""
    found = [i for i, order in world["orders"].items() if order["customer"] == customer]
    if not found:
        raise ToolError(f"{customer} has no order")
    return world, ", ".join(found)


def get_order(world: Data, order_id: str) -> tuple[Data, str]:
    """Returns item, status and price of an order."""
    order = _order(world, order_id)
    return world, f"{order['item']}, {order['status']}, price {order['price']}"


def cancel_order(world: Data, order_id: str) -> tuple[Data, str]:
    """Cancels an order."""
    return _with_status(world, order_id, "cancelled"), f"cancelled {order_id}"


def return_order(world: Data, order_id: str) -> tuple[Data, str]:
    """Takes an order back."""
    return _with_status(world, order_id, "returned"), f"returned {order_id}"


def add_credit(world: Data, customer: str, amount: int) -> tuple[Data, str]:
    """Gives credit to a customer."""
    total = world["credit"].get(customer, 0) + amount
    return {**world, "credit": {**world["credit"], customer: total}}, f"{customer} has {total} credit"


def check_stock(world: Data, item: str) -> tuple[Data, str]:
    """Says how many of an item are there."""
    if item not in world["stock"]:
        raise ToolError(f"there is no item {item}")
    return world, f"{world['stock'][item]} of {item}"


def place_order(world: Data, customer: str, item: str) -> tuple[Data, str]:
    """Orders one of an item for a customer."""
    if world["stock"].get(item, 0) < 1:
        raise ToolError(f"{item} is sold out")
    name = f"o{max((int(i[1:]) for i in world['orders']), default=0) + 1}"
    order = {"customer": customer, "item": item, "status": "open", "price": 0}
    return {
        **world,
        "orders": {**world["orders"], name: order},
        "stock": {**world["stock"], item: world["stock"][item] - 1},
    }, f"placed {name}"


def _some_order(data: Data, names: Names, *statuses: str) -> tuple[str, dict[str, Any]] | None:
    """Returns an order of a customer who has no other."""
    customers = [order["customer"] for order in data["orders"].values()]
    found = [
        (i, order)
        for i, order in data["orders"].items()
        if order["status"] in statuses and customers.count(order["customer"]) == 1
    ]
    return names.pick(found) if found else None


def _stock(data: Data, names: Names) -> Request | None:
    item = names.pick(list(data["stock"]))
    count = data["stock"][item]
    return Request(
        f"How many {item} are there?",
        (Step(f"Check {item}.", call("check_stock", item=item)),),
        reply=f"There are {count} of {item}.",
        mention=f"{count} of {item}",
    )


def _place(data: Data, names: Names) -> Request | None:
    there = [item for item, count in data["stock"].items() if count > 0]
    if not there:
        return None
    item, customer = names.pick(there), names()
    return Request(
        f"I am {customer}. Order one {item} for me.",
        (Step(f"Order {item}.", call("place_order", customer=customer, item=item)),),
        vague=f"I am {customer}. Order something for me.",
        detail=f"One {item}.",
    )


def _status(data: Data, names: Names) -> Request | None:
    if (found := _some_order(data, names, "open", "shipped", "delivered")) is None:
        return None
    name, order = found
    customer, status = order["customer"], order["status"]
    return Request(
        f"I am {customer}. How far is my order?",
        (
            Step(f"Find {customer}.", call("find_order", customer=customer)),
            Step(f"It is {name}.", call("get_order", order_id=name)),
        ),
        reply=f"It is {status}.",
        mention=status,
        vague="How far is my order?",
        detail=f"I am {customer}.",
    )


def _cancel(data: Data, names: Names) -> Request | None:
    if (found := _some_order(data, names, "open", "shipped")) is None:
        return None
    name, order = found
    customer, status = order["customer"], order["status"]
    steps = [
        Step(f"Find {customer}.", call("find_order", customer=customer)),
        Step(f"It is {name}.", call("get_order", order_id=name)),
    ]
    if status == "open":
        steps.append(Step("It is open.", call("cancel_order", order_id=name)))
    return Request(
        f"I am {customer}. Cancel my order.",
        tuple(steps),
        reply="Done." if status == "open" else REFUSAL,
        vague="Cancel my order.",
        detail=f"I am {customer}.",
    )


def _return(data: Data, names: Names) -> Request | None:
    if (found := _some_order(data, names, "delivered", "shipped")) is None:
        return None
    name, order = found
    customer, status, price = order["customer"], order["status"], order["price"]
    steps = [
        Step(f"Find {customer}.", call("find_order", customer=customer)),
        Step(f"It is {name}.", call("get_order", order_id=name)),
    ]
    if status == "delivered":
        steps += [
            Step("It is delivered.", call("return_order", order_id=name)),
            Step(f"The price is {price}.", call("add_credit", customer=customer, amount=price)),
        ]
    return Request(
        f"I am {customer}. I want to return my order.",
        tuple(steps),
        reply="Done." if status == "delivered" else REFUSAL,
        vague="I want to return my order.",
        detail=f"I am {customer}.",
    )


def _data(names: Names, noise: int) -> Data:
    ids = names.rng.choice(90, size=3 + noise, replace=False) + 10
    stock = {names(): names.number(0, 9) for _ in range(2 + noise)}
    statuses = ["open", "shipped", "delivered"]
    return {
        "orders": {
            f"o{i}": {
                "customer": names(),
                "item": names.pick(list(stock)),
                "status": statuses[n] if n < 3 else names.pick(statuses),
                "price": names.number(10, 99),
            }
            for n, i in enumerate(ids)
        },
        "stock": stock,
        "credit": {},
    }


SHOP = Domain(
    "shop",
    (find_order, get_order, cancel_order, return_order, add_credit, check_stock, place_order),
    _data,
    (Kind(1, _stock), Kind(1, _place), Kind(2, _status), Kind(3, _cancel), Kind(4, _return)),
    POLICY,
)
