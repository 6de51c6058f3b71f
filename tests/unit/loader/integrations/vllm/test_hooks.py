"""Published weights while vLLM's workers change them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_loader.integrations.vllm import hooks


class Start:
    """As a `ModelStart`: notes what is asked of it."""

    def __init__(self, deeds: list[str]) -> None:
        self.deeds, self.discarded, self.left = deeds, False, False

    def pause(self) -> None:
        self.deeds.append("pause")

    def resume(self) -> None:
        self.deeds.append("resume")

    def republish(self) -> None:
        self.deeds.append("republish")

    def close(self) -> None:
        self.deeds.append("close")


def compute(worker: Any, error: Exception | None = None) -> int:
    if error is not None:
        raise error
    return 7


def a_worker(deeds: list[str]) -> tuple[type[Any], type[Any]]:
    """vLLM's class of workers, and that of a platform, which sleeps in another way."""

    class Worker:
        def sleep(self, level: int = 1) -> None:
            deeds.append(f"sleep {level}")

        def wake_up(self, tags: list[str] | None = None) -> str:
            deeds.append("wake up")
            return "awake"

        def reload_weights(self, fail: bool = False) -> None:
            deeds.append("reload")
            if fail:
                raise OSError("no such checkpoint")

        def discard(self, tags: tuple[str, ...]) -> None:
            deeds.append("discard")

        def reset_weights(self) -> None:
            deeds.append("reset")

        def start_weight_update(self) -> None:
            deeds.append("start")

        def finish_weight_update(self) -> None:
            deeds.append("finish")

        execute_model = compute

        def shutdown(self) -> None:
            deeds.append("shut down")

        def compile_or_warm_up_model(self) -> float:
            deeds.append("warm up")
            return 1.5

    class CPUWorker(Worker):
        def sleep(self, level: int = 1) -> None:
            deeds.append(f"sleep {level} on a CPU")

    return Worker, CPUWorker


@pytest.fixture
def deeds() -> list[str]:
    return []


@pytest.fixture
def start(deeds: list[str], monkeypatch: pytest.MonkeyPatch) -> Start:
    start = Start(deeds)
    monkeypatch.setattr(hooks, "served_models", lambda: [start])
    return start


@pytest.fixture
def worker(deeds: list[str], start: Start, monkeypatch: pytest.MonkeyPatch) -> Any:
    module, (base, platforms) = ModuleType("gpu_worker"), a_worker(deeds)
    vars(module)["Worker"] = base
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", module)
    assert hooks.install()
    assert hooks.install()  # a second model of the process
    return platforms()


def test_what_was_compiled_is_published_after_the_warm_up(
    worker: Any, deeds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling = ModuleType("compiling")
    vars(compiling)["publish_compile_cache"] = lambda: deeds.append("publish")
    monkeypatch.setitem(sys.modules, "engine_loader.integrations.vllm.compiling", compiling)
    assert worker.compile_or_warm_up_model() == 1.5
    assert deeds == ["warm up", "publish"]


def test_they_are_paused_before_a_sleep_and_go_on_after_it(worker: Any, deeds: list[str]) -> None:
    worker.sleep()
    assert worker.wake_up() == "awake"
    assert deeds == ["pause", "sleep 1 on a CPU", "wake up", "resume"]


def test_they_wait_until_the_weights_wake_up(worker: Any, deeds: list[str]) -> None:
    worker.sleep(1)
    worker.wake_up(["kv_cache"])
    assert "resume" not in deeds
    worker.wake_up(tags=["weights"])
    assert deeds[-1] == "resume"


@pytest.mark.parametrize("sleep", [lambda one: one.sleep(2), lambda one: one.sleep(level=2)])
def test_discarded_weights_are_served_after_a_reload(
    worker: Any, deeds: list[str], sleep: Callable[[Any], None]
) -> None:
    sleep(worker)
    worker.wake_up()
    assert "resume" not in deeds
    worker.reload_weights()
    assert deeds[-2:] == ["reload", "republish"]


@pytest.mark.parametrize(
    "lose", [lambda one: one.discard(("weights",)), lambda one: one.reset_weights()]
)
def test_weights_that_are_thrown_away_are_not_resumed(
    worker: Any, deeds: list[str], lose: Callable[[Any], None]
) -> None:
    lose(worker)
    worker.wake_up()
    assert deeds[0] == "pause"
    assert "resume" not in deeds


def test_what_else_is_discarded_does_not_matter(worker: Any, deeds: list[str]) -> None:
    worker.discard(("kv_cache",))
    assert deeds == ["discard"]


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        (lambda one: one.sleep(2), True),
        (lambda one: one.discard(("weights",)), True),
        (lambda one: one.reset_weights(), True),
        (lambda one: one.reload_weights(), True),
        (lambda one: one.sleep(1), False),
        (lambda one: one.discard(("kv_cache",)), False),
        (lambda one: one.start_weight_update(), False),
    ],
)
def test_what_remembers_weights_is_told_when_they_become_others(
    worker: Any, change: Callable[[Any], None], tells: bool
) -> None:
    class Remembers:
        told = False

        def forget(self) -> None:
            self.told = True

    one = Remembers()
    hooks.tell(one)
    change(worker)
    assert one.told is tells


def test_an_update_is_published_at_its_end(worker: Any, deeds: list[str]) -> None:
    worker.start_weight_update()
    assert deeds == ["pause", "start"]
    worker.finish_weight_update()
    assert deeds[2:] == ["finish", "republish"]


class Updating:
    """A worker of three."""

    vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=3))

    def __init__(self, rank: int, all_failed: bool) -> None:
        self.rank = rank
        self.weight_transfer_engine = SimpleNamespace(all_failed=all_failed)

    def sleep(self) -> None:
        pass

    def reload_weights(self) -> None:
        pass

    def update_weights(self, error: Exception | None) -> str:
        if error is not None:
            raise error
        return "updated"


@pytest.mark.parametrize("all_failed", [True, False])
def test_of_an_update_that_has_failed_in_all_workers_the_last_one_says_so(
    monkeypatch: pytest.MonkeyPatch, all_failed: bool
) -> None:
    """vLLM would take the errors of the others for answers to its next calls."""
    module, kind = ModuleType("gpu_worker"), type("Worker", (Updating,), dict(vars(Updating)))
    vars(module)["Worker"] = kind
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", module)
    assert hooks.install()
    workers = [kind(rank, all_failed) for rank in range(3)]
    for worker in workers[:2] if all_failed else ():
        assert worker.update_weights(OSError("no weights")) is None
    for worker in workers[2:] if all_failed else workers:
        with pytest.raises(OSError, match="no weights"):
            worker.update_weights(OSError("no weights"))
    assert [worker.update_weights(None) for worker in workers] == ["updated"] * 3


def test_weights_in_doubt_stay_paused(worker: Any, deeds: list[str]) -> None:
    with pytest.raises(OSError, match="no such checkpoint"):
        worker.reload_weights(fail=True)
    assert deeds == ["pause", "reload"]


def test_a_vllm_with_other_workers_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not hooks.install()
    module = ModuleType("gpu_worker")
    vars(module)["Worker"] = type("Worker", (), {"sleep": lambda self: None})
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", module)
    assert not hooks.install()


def test_a_worker_that_is_stopped_withdraws_its_weights(
    worker: Any, deeds: list[str], start: Start
) -> None:
    try:
        raise SystemExit
    except SystemExit:
        worker.shutdown()
    worker.shutdown()
    assert deeds == ["close", "shut down"] * 2
    assert not start.left


def test_a_worker_that_ends_by_an_error_leaves_its_weights(
    worker: Any, deeds: list[str], start: Start
) -> None:
    try:
        raise RuntimeError("CUDA error")
    except RuntimeError:
        worker.shutdown()
    assert deeds == ["shut down"]
    assert start.left


def test_a_worker_whose_engine_ends_by_an_error_leaves_its_weights(
    worker: Any, deeds: list[str], start: Start
) -> None:
    assert worker.execute_model() == 7
    assert not start.left
    with pytest.raises(RuntimeError, match="CUDA error"):
        worker.execute_model(error=RuntimeError("CUDA error"))
    worker.shutdown()  # by its engine
    assert deeds == ["shut down"]
