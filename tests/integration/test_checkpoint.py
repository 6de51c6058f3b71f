"""`EngineReader` in one process: running ranks as a checkpoint of torch's, and what a user sees
where they are none.
"""

from __future__ import annotations

import logging
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from engine_loader import (
    EngineReader,
    InProcessEngine,
    LoadOptions,
    MooncakeEngine,
    Publication,
    Shard,
    publish,
    publish_state_dict,
)
from engine_loader import errors as loader_errors
from engine_loader.errors import (
    DigestMismatch,
    LoaderError,
    SourceLost,
    SourceUnreachable,
    TornRead,
    WeightsMismatch,
)
from engine_registry import Manifest, ModelIdentity, RankRecord, Registry
from engine_registry import errors as registry_errors
from engine_registry.errors import InstanceIncomplete, InstanceNotFound, RecordDamaged
from tests.integration.conftest import Processes
from tests.integration.test_failover import NBYTES, PACE, Sources, at_half
from tests.support.engines import Interrupted
from tests.support.options import for_load, for_publish
from tests.support.processes.source import content, empty

# torch warns whoever loads without a job
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

StateDict = dict[str, Any]


@pytest.fixture
def offer(stack: ExitStack, registry: Registry) -> Callable[..., Publication]:
    """Publishes a state dict, by default as the only rank of `a`."""

    def offer(state_dict: StateDict, **options: Any) -> Publication:
        engine = stack.enter_context(InProcessEngine())
        defaults: StateDict = {
            "instance": "a",
            "rank": 0,
            "world_size": 1,
            "model": ModelIdentity("m"),
            "ttl_s": 3.0,
        }
        return stack.enter_context(
            publish_state_dict(registry, engine, state_dict, **for_publish({**defaults, **options}))
        )

    return offer


def reader_of(registry: Registry, source: Any = "a", **options: Any) -> EngineReader:
    return EngineReader(
        registry, InProcessEngine(), source, **for_load({"timeout_s": 5.0, **options})
    )


def why(state_dict: StateDict, reader: EngineReader, **options: Any) -> Exception:
    """What this load fails with; torch wraps it, and shows it."""
    with pytest.raises(CheckpointException) as caught:
        dcp_load(state_dict, storage_reader=reader, no_dist=True, **options)
    ((exc, _),) = caught.value.failures.values()
    assert isinstance(exc, Exception)
    assert str(exc) in str(caught.value)
    return exc


# -- what comes
# --------------------------------------------------------------------------------------------------


def test_a_nested_state_dict_comes_back_with_all_its_values(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    values = {
        "step": 7,
        "lr": 1e-3,
        "name": "a ✓",
        "betas": (0.9, 0.999),
        "raw": b"\x00\xff",
        "none": None,
        "flags": [True, [1, ""]],
    }
    weights: StateDict = {
        "w": torch.rand(4, 3),
        "blocks": [{"b": torch.rand(2)}, {"b": torch.rand(5)}],
    }
    offer({"model": weights, "train": values, "scale": torch.tensor(2.5)})
    found: StateDict = {
        "model": {"w": torch.zeros(4, 3), "blocks": [{"b": torch.zeros(2)}, {"b": torch.zeros(5)}]},
        "train": dict.fromkeys(values, 0),
        "scale": torch.tensor(0.0),
    }
    dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
    assert found["train"] == values
    assert torch.equal(found["model"]["w"], weights["w"])
    assert torch.equal(found["model"]["blocks"][1]["b"], weights["blocks"][1]["b"])
    assert found["scale"] == 2.5


@pytest.mark.parametrize("digests", [False, True])
def test_an_update_changes_values_together_with_the_tensors(
    registry: Registry, offer: Callable[..., Publication], digests: bool
) -> None:
    weight = torch.zeros(3)
    values: StateDict = {"train.step": 1}
    state_dict = {"w": weight, "train": {"step": 0, "seed": 42}}
    publication = offer(state_dict, version=5, digests=digests)
    for step in (1, 2):
        with publication.update(values=values):
            weight.fill_(step)
            values["train.step"] = step  # read at the end of the block
        found: StateDict = {"w": torch.zeros(3), "train": {"step": 0, "seed": 0}}
        dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
        assert (found["w"].tolist(), found["train"]) == ([step] * 3, {"step": step, "seed": 42})
        assert publication.version == 5 + step
    with publication.update():  # keeps them
        weight.fill_(9)
    dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
    assert (found["w"].tolist(), found["train"]["step"]) == ([9] * 3, 2)


def test_values_that_no_manifest_can_hold_are_refused_before_the_update_begins(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    publication = offer({"w": torch.zeros(3), "step": 1})
    with (
        pytest.raises(loader_errors.TensorsUnusable, match=r"step: is a builtins\.object"),
        publication.update(values={"step": object()}),
    ):
        pytest.fail("the block must not begin")
    found: StateDict = {"w": torch.ones(3), "step": 0}
    dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
    assert (found["w"].tolist(), found["step"], publication.version) == ([0] * 3, 1, 0)


def test_parts_on_several_ranks_are_put_together_in_one_read(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    whole, columns = torch.rand(7, 4), torch.rand(6, 5)
    for rank, (low, high) in enumerate(((0, 3), (3, 7))):
        tensors = {"w": whole[low:high].clone(), "c": columns[:, 2 * rank : 2 + 3 * rank].clone()}
        shards = {"w": Shard((7, 4), (low, 0)), "c": Shard((6, 5), (0, 2 * rank))}
        offer(
            {**tensors, f"only.{rank}": torch.full((2,), rank)},
            rank=rank,
            world_size=2,
            shards=shards,
        )
    found = {
        "w": torch.zeros(7, 4),
        "c": torch.zeros(6, 5),
        "only.0": torch.zeros(2).long(),
        "only.1": torch.zeros(2).long(),
    }
    reader = reader_of(registry)
    dcp_load(found, storage_reader=reader, no_dist=True)
    assert torch.equal(found["w"], whole)
    assert torch.equal(found["c"], columns)
    assert (found["only.0"].tolist(), found["only.1"].tolist()) == ([0, 0], [1, 1])
    (report,) = reader.reports
    assert (report.tensors, report.nbytes) == (4, sum(tensor.nbytes for tensor in found.values()))


def test_only_the_keys_that_are_wanted_are_read(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer({"model": {"a": torch.ones(1000), "b": torch.ones(10)}, "step": 3})
    reader = reader_of(registry)
    found = {"model": {"b": torch.zeros(10)}}
    dcp_load(found, storage_reader=reader, no_dist=True)
    assert found["model"]["b"].all()
    assert [report.read_nbytes for report in reader.reports] == [40]


def test_a_partial_load_leaves_alone_what_the_source_lacks(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer({"a": torch.ones(3)})
    found = {"a": torch.zeros(3), "head": torch.full((2,), 5.0), "epoch": 9}
    dcp_load(
        found,
        storage_reader=reader_of(registry),
        no_dist=True,
        planner=DefaultLoadPlanner(allow_partial_load=True),
    )
    assert (found["a"].tolist(), found["head"].tolist(), found["epoch"]) == ([1, 1, 1], [5, 5], 9)  # type: ignore[attr-defined]


def test_values_alone_are_read_from_etcd_without_a_transfer(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer({"step": 3, "w": torch.ones(3)})
    found, reader = {"step": 0}, reader_of(registry)
    dcp_load(found, storage_reader=reader, no_dist=True)
    assert (found, reader.reports) == ({"step": 3}, [])


def test_a_tensor_that_does_not_lie_in_one_run_is_filled_by_way_of_a_buffer(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    whole = torch.rand(4, 6)
    offer({"w": whole})
    found = {"w": torch.zeros(6, 4).t()}
    dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
    assert torch.equal(found["w"], whole)


class InAnotherDtype(DefaultLoadPlanner):
    """Has the reader fill other tensors, part by part, and puts them into the caller's when
    they have come.
    """

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        tensor: torch.Tensor = super().resolve_tensor(read_item)
        return tensor.to(torch.float32)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor)


def test_a_planner_that_puts_other_tensors_in_place_gets_those_filled(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    whole = torch.rand(7, 4)
    for rank, (low, high) in enumerate(((0, 3), (3, 7))):
        offer(
            {"w": whole[low:high].clone()},
            rank=rank,
            world_size=2,
            shards={"w": Shard((7, 4), (low, 0))},
        )
    found, reader = {"w": torch.zeros(7, 4, dtype=torch.float64)}, reader_of(registry)
    dcp_load(found, storage_reader=reader, no_dist=True, planner=InAnotherDtype())
    assert torch.equal(found["w"], whole.double())
    assert {report.version for report in reader.reports} == {0}


def test_a_checkpoint_id_is_the_name_of_another_instance(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    for value, instance in enumerate(("a", "b")):
        offer({"w": torch.full((3,), value)}, instance=instance)
    found = {"w": torch.zeros(3, dtype=torch.int64)}
    dcp_load(found, storage_reader=reader_of(registry), checkpoint_id="b", no_dist=True)
    assert found["w"].tolist() == [1, 1, 1]


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 6)).square().sum().backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore")  # torch uses what it deprecates
def test_model_and_optimizer_go_on_where_those_of_the_source_are(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    model, optimizer = trained()
    offer(
        {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
            "epoch": 2,
        }
    )
    ours = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
    our_optimizer = torch.optim.AdamW(ours.parameters(), lr=0.5)
    found: StateDict = {
        "model": get_model_state_dict(ours),
        "optimizer": get_optimizer_state_dict(ours, our_optimizer),
        "epoch": 0,
    }
    dcp_load(found, storage_reader=reader_of(registry), no_dist=True)
    set_model_state_dict(ours, found["model"])
    set_optimizer_state_dict(ours, our_optimizer, found["optimizer"])
    assert (our_optimizer.param_groups[0]["lr"], found["epoch"]) == (0.125, 2)
    for one, other in ((model, optimizer), (ours, our_optimizer)):
        step(one, other)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), model.parameters(), strict=True)
    )


# -- tensors without a box
# --------------------------------------------------------------------------------------------------


def opaque(stack: ExitStack, registry: Registry, world_size: int) -> None:
    for rank in range(world_size):
        engine = stack.enter_context(InProcessEngine())
        stack.enter_context(
            publish(
                registry,
                engine,
                instance="a",
                rank=rank,
                world_size=world_size,
                model=ModelIdentity("m"),
                tensors={"w": torch.full((3 + rank,), float(rank))},
            )
        )


def test_a_tensor_without_a_box_comes_from_the_rank_that_is_named(
    registry: Registry, stack: ExitStack
) -> None:
    opaque(stack, registry, 2)
    found = {"w": torch.zeros(4)}
    dcp_load(found, storage_reader=reader_of(registry, rank=1), no_dist=True)
    assert found["w"].tolist() == [1, 1, 1, 1]


def test_for_a_tensor_without_a_box_no_other_rank_has_to_be_in_reach(
    registry: Registry, stack: ExitStack
) -> None:
    island, mainland, here = (
        stack.enter_context(InProcessEngine(fabric=name))
        for name in ("island", "mainland", "mainland")
    )
    for rank, engine in enumerate((island, mainland)):
        stack.enter_context(
            publish(
                registry,
                engine,
                instance="a",
                rank=rank,
                world_size=2,
                model=ModelIdentity("m"),
                tensors={"w": torch.ones(3)},
            )
        )
    found = {"w": torch.zeros(3)}
    dcp_load(
        found, storage_reader=EngineReader(registry, here, "a", rank=1, timeout_s=5), no_dist=True
    )
    assert found["w"].all()


def test_a_tensor_without_a_box_is_not_guessed_where_the_job_is_of_another_size(
    registry: Registry, stack: ExitStack
) -> None:
    opaque(stack, registry, 2)
    exc = why({"w": torch.zeros(3)}, reader_of(registry))
    assert isinstance(exc, WeightsMismatch)
    assert "1 tensors of a do not say which part of the whole they are" in str(exc)
    assert "say `rank`" in str(exc)


# -- what a user sees
# --------------------------------------------------------------------------------------------------


def test_an_instance_that_is_not_there_is_the_error_and_nothing_else_is_logged(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        exc = why({"w": torch.zeros(3)}, reader_of(registry, timeout_s=0.1))
    assert isinstance(exc, InstanceNotFound)
    assert "a" in str(exc)
    assert not [
        record for record in caplog.records if not record.name.startswith("c10d-NullHandler")
    ]


def test_metadata_that_could_not_be_read_are_an_error_where_they_are_looked_at(
    registry: Registry,
) -> None:
    metadata = reader_of(registry, timeout_s=0.1).read_metadata()
    with pytest.raises(InstanceNotFound):
        print(metadata.state_dict_metadata)


def test_a_reader_that_has_not_read_its_metadata_says_so(registry: Registry) -> None:
    with pytest.raises(LoaderError, match="the metadata have not been read"):
        reader_of(registry).prepare_local_plan(LoadPlan([]))


def test_a_missing_rank_is_named(registry: Registry, offer: Callable[..., Publication]) -> None:
    offer({"w": torch.ones(3)}, world_size=2)
    exc = why({"w": torch.zeros(3)}, reader_of(registry, timeout_s=0.1))
    assert isinstance(exc, InstanceIncomplete)
    assert "missing rank 1 of 2" in str(exc)


def test_an_instance_that_cannot_be_reached_says_why(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    offer({"w": torch.ones(3)})
    with MooncakeEngine("127.0.0.1") as engine:
        exc = why({"w": torch.zeros(3)}, EngineReader(registry, engine, "a", timeout_s=5))
    assert isinstance(exc, SourceUnreachable)
    assert "is served over in_process, this engine speaks tcp" in str(exc)


def test_a_rank_that_leaves_before_its_manifest_is_read_is_reported_as_lost(
    registry: Registry, offer: Callable[..., Publication], monkeypatch: pytest.MonkeyPatch
) -> None:
    publication = offer({"w": torch.ones(3)})
    manifests = registry.manifests

    def after_it_has_left(records: Sequence[RankRecord]) -> Sequence[Manifest | RecordDamaged]:
        publication.close()
        return manifests(records)

    monkeypatch.setattr(registry, "manifests", after_it_has_left)
    exc = why({"w": torch.zeros(3)}, reader_of(registry))
    assert isinstance(exc, SourceLost)
    assert str(exc) == "/engines/a/0 is not registered any more: load again"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"v": torch.zeros(3)}, "Missing key in checkpoint state_dict: v"),
        (
            {"w": torch.zeros(4)},
            r"Size mismatch between saved torch.Size([3]) and current: torch.Size([4]) for w",
        ),
        ({"w": torch.zeros(3).half()}, "w: dtype float32 in the source, float16 here"),
        ({"w": 3}, "Invalid checkpoint metadata for w"),
    ],
    ids=["missing", "another shape", "another dtype", "no tensor"],
)
def test_what_does_not_fit_is_reported_and_nothing_is_read(
    registry: Registry, offer: Callable[..., Publication], found: StateDict, said: str
) -> None:
    offer({"w": torch.ones(3)})
    reader = reader_of(registry)
    assert said in str(why(found, reader))
    assert not reader.reports
    assert not any(tensor.any() for tensor in found.values() if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize("held", [(), (0, 3), (4, 10)], ids=["nothing", "the beginning", "the end"])
def test_what_no_rank_holds_is_an_error_and_not_left_out(
    registry: Registry, offer: Callable[..., Publication], held: tuple[int, int] | tuple[()]
) -> None:
    low, high = held or (0, 0)
    offer({"w": torch.ones(high - low)}, shards={"w": Shard((10,), (low,))})
    exc = why({"w": torch.zeros(10)}, reader_of(registry))
    assert isinstance(exc, WeightsMismatch)
    assert f"w: no rank of the source holds the box at [{0 if low else high}]" in str(exc)


def test_a_value_that_this_version_cannot_read_is_named(
    registry: Registry, offer: Callable[..., Publication], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer({"w": torch.ones(1)})
    reader = reader_of(registry)
    manifests = registry.manifests
    newer = {"when": {"date": "today"}}
    monkeypatch.setattr(
        registry,
        "manifests",
        lambda records: [replace(each, values=newer) for each in manifests(records)],  # type: ignore[type-var]
    )
    assert "the value 'when' of a cannot be read: a value has the unknown tag 'date'" in str(
        why({"when": 0}, reader)
    )


def errors_of(module: Any, base: type[Exception]) -> list[type[Exception]]:
    return [
        kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)
    ]


@pytest.mark.parametrize(
    "kind",
    [
        *errors_of(loader_errors, LoaderError),
        *errors_of(registry_errors, registry_errors.RegistryError),
    ],
)
def test_every_error_can_be_sent_to_the_other_processes_of_the_job(kind: Any) -> None:
    sent = pickle.loads(pickle.dumps(kind("what happened", key="k")))  # noqa: S301  (as torch sends them)
    assert (type(sent), str(sent), sent.details) == (kind, "what happened", {"key": "k"})


# -- while it reads
# --------------------------------------------------------------------------------------------------


class Meanwhile(DefaultLoadPlanner):
    """Something happens when all is planned and nothing read."""

    def __init__(self, action: Callable[[], object]) -> None:
        super().__init__()
        self._action = action

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        self._action()
        return super().finish_plan(new_plan)


def test_alone_a_load_that_an_update_overtakes_brings_the_newer_version(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    weights = {"w": torch.zeros(1000)}
    publication = offer(weights)

    def update() -> None:
        with publication.update():
            weights["w"].fill_(1)

    found, reader = {"w": torch.full((1000,), 7.0)}, reader_of(registry)
    dcp_load(found, storage_reader=reader, no_dist=True, planner=Meanwhile(update))
    assert found["w"].eq(1).all()
    assert [report.version for report in reader.reports] == [1]


class OneOfTwo(EngineReader):
    """As if another process had planned the same."""

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return super().prepare_global_plan(plans * 2)[:1]


def test_in_a_job_a_load_that_an_update_overtakes_is_an_error_and_never_a_mix(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    publication = offer({"w": torch.ones(1000)})

    def update() -> None:
        with publication.update():
            pass

    found = {"w": torch.zeros(1000)}
    exc = why(
        found, OneOfTwo(registry, InProcessEngine(), "a", timeout_s=5), planner=Meanwhile(update)
    )
    assert isinstance(exc, TornRead)
    assert (
        "changed after this load had begun (the weights that were wanted are not served any "
        "more: a has been updated" in str(exc)
    )
    assert not found["w"].any()


def test_the_processes_of_a_job_read_the_newest_version_that_any_has_seen(
    registry: Registry,
) -> None:
    plans = reader_of(registry).prepare_global_plan(
        [LoadPlan([], storage_data=version) for version in (3, 5, 4)]
    )
    assert [plan.storage_data for plan in plans] == [5, 5, 5]


def test_digests_are_compared_if_wanted(
    registry: Registry, offer: Callable[..., Publication]
) -> None:
    weights = {"w": torch.ones(8), "v": torch.ones(8)}
    offer(weights, digests=True)
    found = {"w": torch.zeros(8), "v": torch.zeros(8)}
    dcp_load(found, storage_reader=reader_of(registry, verify="digest"), no_dist=True)
    weights["v"].view(torch.uint8)[3] ^= 1
    exc = why(found, reader_of(registry, verify="digest"))
    assert isinstance(exc, DigestMismatch)
    assert exc.details["tensors"] == ["v"]


def test_a_source_that_withdraws_in_the_middle_is_done_without(
    registry: Registry, offer: Callable[..., Publication], stack: ExitStack
) -> None:
    wanted = {f"t{number}": torch.rand(1 << 20) for number in range(8)}
    publications = [
        offer({name: one.clone() for name, one in wanted.items()}, instance=name)
        for name in ("a", "b")
    ]
    engine = stack.enter_context(Interrupted(publications[0].close, at=2))
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    reader = EngineReader(registry, engine, ["a", "b"], timeout_s=5)
    dcp_load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert {
        share.name for share in reader.reports[0].shares if share.nbytes and not share.error
    } == {"/engines/b/0"}


def test_a_source_process_that_is_killed_in_the_middle_is_done_without(
    registry: Registry, processes: Processes
) -> None:
    sources = Sources(registry, processes)
    sources.start("a", "b")
    found = empty(NBYTES)
    with MooncakeEngine("127.0.0.1") as engine:
        reader = EngineReader(
            registry,
            engine,
            ["a", "b"],
            rank=0,
            options=LoadOptions(
                pace=PACE, progress=at_half(lambda: sources.signal(signal.SIGKILL))
            ),
        )
        dcp_load(found, storage_reader=reader, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in content(0, NBYTES).items())
    assert {
        share.name for share in reader.reports[0].shares if share.nbytes and not share.error
    } == {"/engines/b/0"}
