"""What `benchmarks.gpu` does without a GPU: its sets, its rule that wrong bytes have no time,
its steps, its end.
"""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from benchmarks.gpu import run
from benchmarks.gpu.__main__ import command
from benchmarks.gpu.goals import goals
from benchmarks.gpu.phases import REST, Phases, missing_steps
from benchmarks.gpu.report import Results
from benchmarks.gpu.rows import AGAIN, COLD, EACH_NCCL, FLAT_COPY, WARM, Row, Target, in_turns
from benchmarks.gpu.sets import SETS, filled, nbytes_of
from engine_cli.exits import Exit, code_of
from engine_loader.errors import DigestMismatch, EngineUnavailable

LAYOUT = {"a": (torch.uint8, (13,)), "b": (torch.bfloat16, (4, 3)), "c": (torch.uint8, (13,))}


@pytest.mark.parametrize(
    ("name", "tensors", "gigabytes"),
    [
        ("mixed", 2_256, 8.606),
        ("large", 256, 8.590),
        ("llama-70b-tp8", 723, 17.641),
        ("small", 20_000, 0.328),
    ],
)
def test_the_sets_are_as_large_as_what_they_stand_for(
    name: str, tensors: int, gigabytes: float
) -> None:
    layout = SETS[name](1.0)
    assert len(layout) == tensors
    assert nbytes_of(layout) / 1e9 == pytest.approx(gigabytes, abs=0.001)


def test_the_weights_of_a_rank_of_a_70b_model_are_whole_where_they_are_no_matrices() -> None:
    layout = SETS["llama-70b-tp8"](1.0)
    assert layout["model.layers.79.input_layernorm.weight"][1] == (8192,)
    assert layout["model.layers.79.mlp.down_proj.weight"][1] == (8192, 3584)
    assert layout["model.layers.0.self_attn.k_proj.weight"][1] == (128, 8192)


def test_every_process_makes_the_same_content_and_no_two_tensors_are_alike() -> None:
    once, again = filled(LAYOUT, "cpu"), filled(LAYOUT, "cpu")
    assert all(
        torch.equal(once[name].view(torch.uint8), again[name].view(torch.uint8)) for name in LAYOUT
    )
    assert not torch.equal(once["a"], once["c"])


def test_a_time_is_reported_only_where_every_byte_is_as_it_should_be() -> None:
    wanted = filled(LAYOUT, "cpu")
    tensors = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    target = Target(tensors, wanted)

    def fill(without: str = "") -> int:
        for name, tensor in tensors.items():
            if name != without:
                tensor.copy_(wanted[name])
        return 7

    seconds, result = target.time("whole", fill)
    assert seconds >= 0
    assert result == 7
    with pytest.raises(
        DigestMismatch, match=r"^half: 1 of 3 tensors are not what the source holds.*: b$"
    ) as caught:
        # where what was there before would have been right
        target.time("half", lambda: fill(without="b"))
    assert code_of(caught.value) == Exit.WEIGHTS
    with pytest.raises(DigestMismatch, match="2 of 3"):
        target.time_new("new", lambda: {"a": wanted["a"], "b": wanted["b"] + 1})


def test_tensors_are_looked_at_in_groups_and_each_wrong_one_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.gpu.rows._AT_ONCE_NBYTES", 30)
    wanted = filled(LAYOUT, "cpu")
    target = Target({name: tensor.clone() for name, tensor in wanted.items()}, wanted)
    assert not target.wrong()
    target.flat["c"][-1] += 1
    assert target.wrong() == ["c"]
    target.poison()
    assert target.wrong() == list(LAYOUT)


def test_what_is_compared_takes_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def action(name: str) -> float:
        order.append(name)
        return float(len(order))

    took = in_turns({name: lambda name=name: action(name) for name in "abc"}, 2)  # type: ignore[misc]
    assert "".join(order) == "abcbcacab"
    assert took == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_goals_are_met_missed_or_not_run_and_are_about_one_protocol() -> None:
    rows = [
        Row("mixed", WARM, 10**9, (0.2, 0.1, 0.3), protocol="cuda_ipc"),
        Row("mixed", WARM, 10**9, (9.0,), protocol="nvlink_intra"),
        Row("mixed", COLD, 10**9, (0.3,), protocol="cuda_ipc"),
        Row("mixed", FLAT_COPY, 2 * 10**9, (0.2,)),  # of other bytes
        Row("small", EACH_NCCL, note="not run"),
        Row("small", AGAIN, 10**9, (0.2,), protocol="cuda_ipc"),
    ]
    counts = {"kills": {"kills": 50, "SourceLost": 3, "dead contexts": 1}}
    verdicts = {
        goal.what: (goal.value and round(goal.value, 6), goal.verdict)
        for goal in goals(rows, counts, "cuda_ipc")
    }
    assert verdicts[f"mixed: time of {COLD}, to {WARM}"] == (1.5, "met")
    assert verdicts[f"mixed: time of {WARM}, to {FLAT_COPY}"] == (2.0, "missed")
    assert verdicts[f"small: rate of {AGAIN}, to {EACH_NCCL}"][1] == "not run"
    assert verdicts["kills: dead contexts"] == (1.0, "missed")
    assert verdicts["kills: wrong bytes"] == (0.0, "met")
    updates = [verdict for what, (_, verdict) in verdicts.items() if what.startswith("updates: ")]
    assert updates == ["not run"]


def test_a_row_has_median_and_extremes_and_one_that_was_not_run_says_why() -> None:
    row = Row("mixed", WARM, 10**9, (0.2, 0.1, 0.4))
    assert row.median_s == 0.2
    assert {
        "median_s": 0.2,
        "min_s": 0.1,
        "max_s": 0.4,
        "gb_per_s": 5.0,
    }.items() <= row.as_json().items()
    assert row.cells()[3:6] == ["200.00", "100.00", "400.00"]
    missing = Row("failover", "2 sources", note="not run: 2 GPUs")
    assert "median_s" not in missing.as_json()
    assert missing.cells()[-1] == "not run: 2 GPUs"


def test_every_step_of_a_load_that_is_timed_is_still_there() -> None:
    assert missing_steps() == []


class Clock:
    """Of the steps. It goes on when the test says so."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def perf_counter(self) -> float:
        return self._now_s

    def go_on(self, seconds: float) -> None:
        self._now_s += seconds


def test_a_step_is_reported_without_the_steps_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()

    def choose() -> None:
        inner()
        clock.go_on(1)
        inner()

    def load() -> None:
        outer()
        clock.go_on(3)

    monkeypatch.setattr("benchmarks.gpu.phases.time", clock)
    found = Phases()
    inner = found.timed("plan", lambda: clock.go_on(2))
    outer = found.timed("choose sources", choose)
    found.call(load)
    assert found.medians() == {"plan": 4, "choose sources": 1, REST: 3}


@pytest.mark.parametrize("count", [0, 1])
def test_without_two_gpus_it_ends_with_one_line_that_says_so(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    ran = CliRunner().invoke(command, [])
    assert isinstance(ran.exception, EngineUnavailable)
    assert str(ran.exception).startswith(
        f"this measures from GPU to GPU, and {count} CUDA GPUs can be used here: "
    )
    assert "\n" not in str(ran.exception)
    assert code_of(ran.exception) == Exit.FAILED


def test_what_was_measured_before_something_failed_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(results: Results, *_: object) -> None:
        results.rows.append(Row("mixed", WARM, 10**9, (0.2,)))
        raise DigestMismatch("wrong bytes")

    monkeypatch.setattr(run, "gpus", lambda: run.Devices(("cpu",), ("cpu",), ("tcp",)))
    monkeypatch.setattr(run, "measure", measure)
    ran = CliRunner().invoke(command, ["--json"])
    assert [row["median_s"] for row in json.loads(ran.stdout)["rows"]] == [0.2]
    assert isinstance(ran.exception, DigestMismatch)


def test_a_part_that_there_is_not_is_wrong_usage() -> None:
    ran = CliRunner().invoke(command, ["--only", "mixed,everything"])
    assert ran.exit_code == Exit.USAGE
    assert all(part in ran.output for part in run.PARTS)
