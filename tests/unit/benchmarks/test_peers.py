"""What `benchmarks.peers` does without a process: its sets, its pairs, its files and its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.peers.candidates import CANDIDATES, OURS, REFERENCE
from benchmarks.peers.pairing import loads_of
from benchmarks.peers.parts import Extent, rotated
from benchmarks.peers.report import BEGIN, END, PageUnmarked, page_with, tables
from benchmarks.peers.results import PartResults, SettingsDiffer, Turn, collected
from benchmarks.peers.sets import TensorSet, flat, poison, spread, wrong
from benchmarks.peers.side import said
from benchmarks.peers.weights import SETS
from benchmarks.peers.work import LoadFailed
from engine_loader.errors import SourceLost
from tests.support.checkout import ROOT

SETTINGS: dict[str, Any] = {"scale": 1.0, "pairs": 1}
MACHINE = {"date": "2026-11-29", "kernel": "6"}


def turn(candidate: str, number: int, seconds: Sequence[float], reference: Sequence[float]) -> Turn:
    loads = [
        {"reference_s": r, "seconds": s, "source_cpu_s": 0.5, "reader_cpu_s": 0.25}
        for s, r in zip(seconds, reference, strict=True)
    ]
    found = {
        "started_s": 1.0,
        "first_s": 2.0,
        "loads": loads,
        "memory": {"source": 10 + number, "reader": 20},
    }
    return Turn("loopback", "blocks", number, candidate, 4, 1_000_000_000, found)


@pytest.mark.parametrize(
    ("name", "tensors", "nbytes"),
    [
        ("blocks", 500, 500 << 21),
        ("checkpoint", 104, 90_856_960),
        ("small", 20_000, 20_000 << 12),
        ("single", 1, 1 << 30),
    ],
)
def test_the_sets_are_as_large_as_what_they_stand_for(name: str, tensors: int, nbytes: int) -> None:
    tensor_set = SETS[name](1.0)
    assert (len(tensor_set.sizes), tensor_set.nbytes) == (tensors, nbytes)


@pytest.mark.parametrize("joined", [False, True])
def test_every_process_makes_the_same_bytes_and_one_that_differs_is_found(joined: bool) -> None:
    tensor_set = TensorSet([3 << 20, 5, 1 << 20, 1 << 20], joined)
    tensors = tensor_set.filled()
    assert wrong(tensors) == []
    assert not torch.equal(tensors["t2"], tensors["t3"])
    assert not torch.equal(tensors["t0"][: 1 << 20], tensors["t0"][1 << 20 : 2 << 20])
    tensors["t0"][-1] ^= 1
    tensors["t1"][0] ^= 1
    assert wrong(tensors) == ["t0", "t1"]


def test_memory_that_nothing_was_loaded_into_is_wrong_everywhere() -> None:
    tensors = TensorSet([4096, 1 << 20, 7]).filled()
    poison(tensors)
    assert wrong(tensors) == ["t0", "t1", "t2"]


def test_a_flat_copy_spreads_to_the_tensors_that_it_came_from() -> None:
    tensor_set = TensorSet([13, 4096, 1])
    into = tensor_set.allocate()
    spread(flat(tensor_set.filled()), into)
    assert wrong(into) == []


@given(st.lists(st.text(min_size=1), min_size=1, unique=True), st.integers(0, 100))
def test_every_round_has_every_candidate_once(names: list[str], number: int) -> None:
    order = rotated(names, number)
    assert sorted(order) == sorted(names)
    assert order[0] == names[number % len(names)]


def test_ratios_are_medians_of_pairs_and_not_ratios_of_medians() -> None:
    # the machine is four times as slow in the second round, for both
    turns = [
        turn(OURS, 0, [2.0], [1.0]),
        turn(OURS, 1, [8.0], [4.0]),
        turn(OURS, 2, [2.2], [1.0]),
        turn("nixl", 0, [3.0], [1.0]),
        turn("nixl", 1, [12.0], [4.0]),
        turn("nixl", 2, [3.3], [1.0]),
    ]
    found = loads_of(turns, OURS)
    assert found["nixl"].to_reference == pytest.approx(3.0)
    assert found["nixl"].to_ours == pytest.approx(1.5)
    assert found[OURS].to_ours == pytest.approx(1.0)


def test_rounds_in_which_ours_failed_say_nothing_about_the_ratio_to_ours() -> None:
    failed = Turn("loopback", "blocks", 1, OURS, 4, 1, error={"type": "E", "message": "m"})
    turns = [turn(OURS, 0, [1.0], [1.0]), failed]
    alone = loads_of([*turns, turn("nixl", 1, [9.0], [1.0])], OURS)
    assert alone["nixl"].to_ours is None
    both = loads_of([*turns, turn("nixl", 0, [2.0], [1.0]), turn("nixl", 1, [9.0], [1.0])], OURS)
    assert both["nixl"].to_ours == pytest.approx(2.0)


def test_cpu_is_for_each_gigabyte_and_memory_is_the_most_of_all_rounds() -> None:
    some = [turn("http", 0, [1.0, 2.0], [1.0, 1.0]), turn("http", 1, [1.0, 1.0], [1.0, 1.0])]
    found = loads_of(some, OURS)["http"]
    assert (found.source_cpu_s, found.reader_cpu_s) == (0.5, 0.25)
    assert (found.source_nbytes, found.reader_nbytes) == (11, 20)
    assert found.gb_per_s == pytest.approx(1.0)


def test_a_run_goes_on_after_the_last_turn_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "results" / "loopback.json"
    first = PartResults(path, SETTINGS, MACHINE)
    done = turn(REFERENCE, 0, [1.0], [1.0])
    first.add(done)
    again = PartResults(path, SETTINGS, MACHINE)
    assert again.has(done.key)
    assert not again.has(turn(REFERENCE, 1, [1.0], [1.0]).key)
    again.add(turn(REFERENCE, 1, [1.0], [1.0]))
    assert len(collected(path.parent)["loopback"]["turns"]) == 2


def test_only_what_is_chosen_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "loopback.json"
    results = PartResults(path, SETTINGS, MACHINE)
    turns = [turn(name, number, [1.0], [1.0]) for number in (0, 1) for name in (OURS, "nixl")]
    for each in turns:
        results.add(each)
    results.forget(Extent(["nixl"], ["small"], [], 1).has)
    assert all(map(results.has, (each.key for each in turns)))
    results.forget(Extent(["nixl"], ["blocks"], [], 1).has)
    again = PartResults(path, SETTINGS, MACHINE)
    assert [again.has(each.key) for each in turns] == [True, False, True, False]


def test_turns_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "loopback.json"
    PartResults(path, SETTINGS, MACHINE).add(turn(REFERENCE, 0, [1.0], [1.0]))
    with pytest.raises(SettingsDiffer, match="another folder"):
        PartResults(path, SETTINGS | {"scale": 0.5}, MACHINE)


def test_a_candidate_that_failed_is_in_the_report_with_its_error(tmp_path: Path) -> None:
    results = PartResults(tmp_path / "loopback.json", SETTINGS, MACHINE)
    results.add(turn(REFERENCE, 0, [1.0], [1.0]))
    error = {"type": "not installed", "message": "ray: run | this"}
    results.add(Turn("loopback", "blocks", 0, "ray", 4, 1_000_000_000, error=error))
    written = tables(collected(tmp_path))
    assert "loopback, loopback, blocks, 1 of 1: `not installed` ray: run \\| this" in written
    for name, candidate in CANDIDATES.items():
        assert f"| {name} | {candidate.title} | {candidate.lacks} |" in written


def test_a_load_that_ended_before_the_kill_has_no_time_of_an_error(tmp_path: Path) -> None:
    results = PartResults(tmp_path / "kills.json", SETTINGS, MACHINE)
    some: list[dict[str, Any]] = [
        {"finished": True},
        {"seconds": 0.5, "type": "E", "message": "gone"},
    ]
    for number, found in enumerate(some):
        results.add(Turn("loopback", "blocks", number, "nixl", 4, 1, found))
    assert "| nixl | 0.50 | 0.50 | 1 of 2 | `E` | gone |" in tables(collected(tmp_path))


def test_idle_sides_have_a_share_each_and_no_service_has_none(tmp_path: Path) -> None:
    results = PartResults(tmp_path / "idle.json", SETTINGS, MACHINE)
    shares = {OURS: {"service": 0.01, "source": 0.0, "reader": 0.5}, "http": {"source": 0.0}}
    for name, some in shares.items():
        results.add(Turn("loopback", "checkpoint", 0, name, 4, 1, {"shares": some}))
    written = tables(collected(tmp_path))
    assert f"| {OURS} | 0.0 | 50.0 | 1.0 |" in written
    assert "| http | 0.0 |  |  |" in written


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LoadFailed("state ERR"), "a code, no exception"),
        (AssertionError("x"), "AssertionError"),
        (SourceLost("gone"), "engine_loader.errors.SourceLost"),
    ],
)
def test_the_type_of_an_error_says_where_it_is_from(error: Exception, kind: str) -> None:
    assert said(error)["type"] == kind


def test_the_tables_take_the_place_of_those_before_and_nothing_else_changes() -> None:
    page = f"# Title\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n"
    once = page_with(page, "new\n")
    assert once == f"# Title\n\n{BEGIN}\n\nnew\n\n{END}\n\nafter\n"
    assert page_with(once, "new\n") == once


@pytest.mark.parametrize("page", ["", BEGIN, END])
def test_a_page_without_marks_is_left_alone(page: str) -> None:
    with pytest.raises(PageUnmarked):
        page_with(page, "new\n")


def test_the_page_has_the_tables_of_the_newest_raw_values() -> None:
    newest = max((ROOT / "benchmarks/results").glob("*-peers.json"))
    page = (ROOT / "docs/explanation/peers-figures.md").read_text()
    assert f"benchmarks/results/{newest.name}" in page
    assert page_with(page, tables(json.loads(newest.read_text()))) == page
