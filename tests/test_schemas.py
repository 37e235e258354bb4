"""The check of arguments against the package that implements all of JSON Schema."""

from __future__ import annotations

from typing import Any

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_envs.schemas import check_value

KINDS = ["string", "integer", "number", "boolean", "null", "array", "object"]
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-3, 3) | st.sampled_from(["", "a", "b"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
kinds = st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), min_size=1, max_size=2, unique=True)
# Python takes True for 1, which `enum` has to be spared: an enumeration of tools holds strings.
rules = st.fixed_dictionaries({}, optional={"type": kinds, "enum": st.lists(st.sampled_from(["a", "b"]), min_size=1)})


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    objects = st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3)},
        optional={
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
        },
    )
    return objects | st.fixed_dictionaries({"type": st.just("array"), "items": inner})


schemas = st.recursive(rules, nested, max_leaves=6)


@settings(max_examples=1500)
@given(schemas, values)
def test_values_pass_where_json_schema_lets_them(schema: dict[str, Any], value: Any) -> None:
    wanted = jsonschema.Draft202012Validator(schema).is_valid(value)
    assert (check_value(value, schema) is None) is wanted, (schema, value)
