"""State dicts as a manifest has them: flat names, and values that come back as they were or are
refused by name.
"""

from __future__ import annotations

import enum
import json
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader import Shard
from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.state_dict import (
    MAX_VALUES_NBYTES,
    decode_value,
    encode_values,
    flatten,
    whole,
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=4)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


def through_etcd(value: Any) -> Any:
    """As another process has it."""
    return decode_value(json.loads(json.dumps(encode_values({"v": value})))["v"])


def same(one: Any, other: Any) -> bool:
    """Equal, and of equal types all the way down: to Python, 1, 1.0 and True are the same."""
    if type(one) is not type(other) or one != other:
        return False
    if isinstance(one, dict):
        return all(same(a, b) for a, b in zip(one.items(), other.items(), strict=True))
    return not isinstance(one, list | tuple) or all(
        same(a, b) for a, b in zip(one, other, strict=True)
    )


@given(values)
def test_plain_data_comes_back_as_it_was_with_its_types(value: Any) -> None:
    assert same(through_etcd(value), value)


@pytest.mark.parametrize("value", [float("inf"), -0.0, 1e300, 2**64, "\ud800", "é\0"], ids=repr)
def test_odd_scalars_come_back(value: Any) -> None:
    found = through_etcd(value)
    assert (repr(found), type(found)) == (repr(value), type(value))


def test_not_a_number_comes_back() -> None:
    assert through_etcd([float("nan")])[0] != 0
    assert repr(through_etcd(float("nan"))) == "nan"


def test_an_ordered_dict_in_a_tuple_comes_back_as_a_dict() -> None:
    assert through_etcd((OrderedDict(a=1),)) == ({"a": 1},)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (object(), "is a builtins.object"),
        ({1, 2}, "is a builtins.set"),
        (torch.float32, "is a torch.dtype"),
        (torch.Size([2]), "is a torch.Size"),
        (1j, "is a builtins.complex"),
        (Colour.RED, "Colour"),
        ((1, [object()]), "is a builtins.object"),
        (({torch.float32: 1},), "is a torch.dtype"),
        (2**5000, "is an integer of 5001 bits"),
        ((torch.zeros(2),), "is a torch.Tensor"),
    ],
    ids=lambda value: re.sub(r" at 0x[0-9a-f]+", "", repr(value)),  # the same in every worker
)
def test_what_is_no_plain_data_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(
        TensorsUnusable,
        match=rf"^1 values of the state dict are neither .* plain data: train\.x: .*{said}",
    ):
        encode_values({"train.step": 3, "train.x": value})


def test_all_that_is_no_plain_data_is_reported_at_once() -> None:
    with pytest.raises(TensorsUnusable) as caught:
        encode_values({"a": object(), "b": 1, "c": set()})
    assert [problem.split(":")[0] for problem in caught.value.details["problems"]] == ["a", "c"]


def test_data_without_an_end_are_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TensorsUnusable, match="endless: maximum recursion depth exceeded"):
        encode_values({"endless": endless})


def test_values_are_limited_to_what_etcd_is_for() -> None:
    encode_values({"table": "x" * (MAX_VALUES_NBYTES - 100)})
    with pytest.raises(
        TensorsUnusable,
        match=rf"take \d+ bytes, {MAX_VALUES_NBYTES} is the limit: make tensors of the large ones",
    ):
        encode_values({"table": "x" * MAX_VALUES_NBYTES})


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"list": [], "tuple": []},
        {"date": "today"},
        {"list": 3},
        {"tuple": None},
        {"dict": [1]},
        {"dict": [[1]]},
        {"dict": [[{"list": []}, 1]]},
        {"bytes": 5},
        {"bytes": "é"},
        {"bytes": "not base64!"},
        {"list": [{"x": 1}]},
    ],
    ids=repr,
)
def test_values_that_somebody_else_has_made_are_refused(stored: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_value(stored)


# -- names
# --------------------------------------------------------------------------------------------------


def test_tensors_and_values_are_named_by_their_path() -> None:
    weight, bias = torch.zeros(2), torch.zeros(3)
    tensors, rest = flatten(
        {
            "model": {"w": weight},
            "list": [bias, {"n": 1}],
            "t": (1, 2),
            "state": {0: {"step": 5}},
            "gone": {},
        }
    )
    assert (list(tensors), tensors["model.w"], tensors["list.0"]) == (
        ["model.w", "list.0"],
        weight,
        bias,
    )
    assert rest == {"list.1.n": 1, "t": (1, 2), "state.0.step": 5}


def test_two_paths_that_make_one_name_are_refused() -> None:
    with pytest.raises(
        TensorsUnusable, match=r"two entries of the state dict have the same name.*a\.b"
    ):
        flatten({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)})


def test_plain_tensors_stand_for_the_whole() -> None:
    assert whole({"w": torch.zeros(2, 3), "s": torch.tensor(1.0)}) == {
        "w": Shard((2, 3), (0, 0)),
        "s": Shard((), ()),
    }
