"""Faults of JSON are named by their path and in our words, also those that msgspec does not see."""

from __future__ import annotations

import enum
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.schema.structs import (
    Malformed,
    Natural,
    check_64_bits,
    convert,
    read,
    schema_of,
    write,
)


class Colour(str, enum.Enum):
    RED = "red"


class Inner(msgspec.Struct, frozen=True):
    count: Natural

    def __post_init__(self) -> None:
        check_64_bits(self, "count")


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    inner: Inner
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=4)] | None = None
    small: Annotated[int, msgspec.Meta(ge=1, lt=10)] = 1
    pair: tuple[int, int] = (0, 0)
    some: Annotated[list[int], msgspec.Meta(min_length=2)] = []
    by_name: dict[str, int] = {}
    colour: Colour = Colour.RED


OUTER = msgspec.json.Decoder(Outer)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("", "`$.inner` is missing"),
        ('"inner":{}', "`$.inner.count` is missing"),
        ('"inner":5', "`$.inner`: an object was expected, a whole number was found"),
        ('"inner":{"count":-1}', "`$.inner.count`: a whole number of at least 0 was expected"),
        (
            '"inner":{"count":1.5}',
            "a whole number was expected, a number with a fraction was found",
        ),
        ('"inner":{"count":18446744073709551616}', "`$.inner`: count is out of range: 1844"),
        ('"name":5', "`$.name`: a text or null was expected, a whole number was found"),
        ('"name":""', "`$.name`: a text of at least 1 was expected"),
        ('"name":"xxxxx"', "`$.name`: a text of at most 4 was expected"),
        ('"small":10', "`$.small`: a whole number of at most 9 was expected"),
        ('"pair":[1]', "`$.pair`: a list of 2 was expected"),
        ('"pair":[1,true]', "`$.pair[1]`: a whole number was expected, true or false was found"),
        ('"some":[1]', "`$.some`: a list of at least 2 was expected"),
        ('"by_name":{"x":[]}', "`$.by_name[...]`: a whole number was expected, a list was found"),
        ('"colour":"blue"', "`$.colour`: 'blue' is none of the words that may stand there"),
        ('"colour":5', "`$.colour`: a text was expected, a whole number was found"),
        (f'"small":{"9" * 5_000}', "`$.small`: the number is out of range"),
        ('"small":NaN', "it is not JSON"),
        ('"name":"\\ud800"', "it is not JSON"),
    ],
)
def test_what_is_wrong_is_said_with_its_path(fields: str, said: str) -> None:
    with pytest.raises(Malformed) as caught:
        read(OUTER, f"{{{fields}}}".encode())
    assert str(caught.value).startswith(said) or said in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"[" * 100_000, b'{"x":' * 100_000, b'{"name":"\xff"}', b'{"inner":{"count":1}}{}'],
)
def test_what_is_no_json_is_said_to_be_none(value: bytes) -> None:
    with pytest.raises(Malformed, match=r"is not JSON|an object was expected"):
        read(OUTER, value)


def test_plain_data_is_converted_with_the_same_words() -> None:
    assert convert({"inner": {"count": 3}}, Outer) == Outer(inner=Inner(3))
    with pytest.raises(Malformed, match=r"^`\$.inner.count` is missing$"):
        convert({"inner": {}}, Outer)


@given(st.binary() | st.text().map(str.encode))
def test_whatever_is_read_is_a_struct_or_malformed(value: bytes) -> None:
    with pytest.raises(Malformed):
        read(OUTER, value)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.str_("x"), b'"x"'),
        (Colour.RED, b'"red"'),
        ({"a": np.str_("x")}, b'{"a":"x"}'),
        (type("Count", (int,), {})(5), b"5"),
    ],
)
def test_what_looks_like_text_or_a_number_is_written_as_one(value: Any, written: bytes) -> None:
    assert write(value) == written


def test_what_json_has_no_form_for_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="object is not JSON"):
        write(object())


@pytest.mark.parametrize(
    ("value", "schema"),
    [(b'{"schema":7,"x":[]}', 7), (b'{"schema":"7"}', 0), (b"{}", 0), (b"", 0), (b"[]", 0)],
)
def test_the_schema_is_read_whatever_else_there_is(value: bytes, schema: int) -> None:
    assert schema_of(value) == schema
