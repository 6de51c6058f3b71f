"""Tensors are summed up as soon as all of their bytes have come, and no sooner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.digests.table import digests_of
from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Span
from engine_loader.sources.early_digests import EarlyDigests

ALGORITHM = "xxh3_128"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    block = torch.arange(300, dtype=torch.uint8)
    return {
        "a": block[:100],
        "b": block[100:250],
        "inside": block[120:130],
        "again": block[100:110],
        "columns": torch.arange(12, dtype=torch.uint8).reshape(3, 4).T,
        "nothing": torch.empty(0),
    }


@pytest.fixture
def early(tensors: dict[str, torch.Tensor]) -> Iterator[EarlyDigests]:
    with closing(EarlyDigests(tensors, ALGORITHM)) as early:
        yield early


def span(tensor: torch.Tensor, start: int, nbytes: int) -> Span:
    return Span(tensor.data_ptr() + start, nbytes, ())


def test_a_tensor_is_summed_up_once_its_last_byte_has_come(
    tensors: dict[str, torch.Tensor], early: EarlyDigests
) -> None:
    a = tensors["a"]
    early.add([span(a, 50, 50), span(a, 0, 49)])
    assert early.of("a") is None
    early.add([span(a, 49, 1)])
    assert early.of("a") == digests_of({"a": a}, ALGORITHM)["a"]


def test_a_read_over_several_tensors_counts_for_each(
    tensors: dict[str, torch.Tensor], early: EarlyDigests
) -> None:
    early.add([span(tensors["a"], 0, 250)])
    wanted = digests_of(tensors, ALGORITHM)
    assert early.of("a") == wanted["a"]
    for name in ("b", "inside", "again"):  # whichever of them is counted
        assert early.of(name) in (None, wanted[name])


def test_single_runs_count_and_runs_at_equal_distances_do_not(
    tensors: dict[str, torch.Tensor], early: EarlyDigests
) -> None:
    a, b = (tensors[name].data_ptr() for name in "ab")
    runs = (Lines(0, a, 60), Lines(90, a + 60, 40))
    early.add([Span(a, 130, (), runs, direct=True)])
    early.add([Span(0, 400, (), (Lines(0, b, 50, (3,), (100,), (50,)),))])
    assert early.of("a") is not None
    assert early.of("b") is None


@pytest.mark.parametrize("name", ["columns", "nothing", "absent"])
def test_what_does_not_lie_in_one_run_is_left_to_the_end(early: EarlyDigests, name: str) -> None:
    assert early.of(name) is None


@given(st.lists(st.integers(1, 39), unique=True), st.randoms())
def test_whatever_comes_in_whichever_order_no_digest_is_of_less_than_all(
    cuts: list[int], chance: Random
) -> None:
    block = torch.arange(40, dtype=torch.uint8)
    tensors = {"x": block[:15], "y": block[15:16], "z": block[16:40]}
    wanted = digests_of(tensors, ALGORITHM)
    bounds = [0, *sorted(cuts), 40]
    parts = list(pairwise(bounds))
    chance.shuffle(parts)
    came: set[int] = set()
    with closing(EarlyDigests(tensors, ALGORITHM)) as early:
        for begin, end in parts:
            early.add([span(block, begin, end - begin)])
            came.update(range(begin, end))
            for name, bytes_of in {"x": range(15), "y": range(15, 16), "z": range(16, 40)}.items():
                assert early.of(name) == (wanted[name] if came.issuperset(bytes_of) else None)
