"""One process of a job of torch.distributed: `python -m tests.support.processes.layout SIDE RANK
SIZE STORE`.

A `source` publishes every layout of LAYOUTS as an instance of that name, prints `published`, and
ends with its input. A `destination` loads the layouts whose names it gets as lines, and prints for
each as JSON what came of it; null if it has no part.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Split
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from engine_cli.options import engine_log
from engine_loader import (
    EngineReader,
    LoadOptions,
    LoadReport,
    MooncakeEngine,
    PublishOptions,
    Shard,
    load,
    load_module,
    publish,
    publish_state_dict,
)
from engine_loader.tensors.shards import is_sharded
from engine_registry import ModelIdentity, Registry
from tests.support.options import for_load
from tests.support.registry import connect

Tensors = dict[str, torch.Tensor]

MODEL = ModelIdentity("laid out")
MESHES: dict[str, list[tuple[int, ...]]] = {
    "source": [(2,), (4,), (2, 2)],
    "destination": [(2,), (3,)],
}
TENSOR_PARALLEL: dict[str, ParallelStyle] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
ROWS, COLUMNS = ["up.weight", "up.bias", "rows", "fewer"], ["down.weight", "columns"]


def whole() -> Tensors:
    """What all layouts are of: sizes that no number of ranks divides, fewer rows than ranks, a
    scalar, an odd dtype, no bytes.
    """
    random = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=random)

    return {
        "up.weight": some(50, 26),
        "up.bias": some(50),
        "down.weight": some(26, 50),
        "down.bias": some(26),
        "rows": some(4093, 257),
        "columns": some(257, 4093).bfloat16(),
        "fewer": some(2, 3),
        "scale": some().double(),
        "bytes": (some(7) * 256).to(torch.uint8),
        "nothing": some(0, 4),
        "experts": some(8, 300, 257).half(),
    }


@dataclass
class Job:
    """This process's place, and what it publishes until the end."""

    registry: Registry
    engine: MooncakeEngine
    rank: int
    meshes: Mapping[tuple[int, ...], DeviceMesh]
    stack: ExitStack
    reports: list[LoadReport] = field(default_factory=list)

    def instance(self, name: str, size: int) -> dict[str, Any]:
        return {
            "instance": name,
            "rank": self.rank,
            "world_size": size,
            "model": MODEL,
            "options": PublishOptions(ttl_s=5.0),
        }

    def reader(self, source: str, **options: Any) -> EngineReader:
        return EngineReader(self.registry, self.engine, source, **for_load(options))


def placed(full: Tensors, mesh: DeviceMesh, placements: Callable[[str], list[Any]]) -> Tensors:
    """Each process cuts out its own part."""
    return {
        name: distribute_tensor(tensor, mesh, placements(name), src_data_rank=None)
        for name, tensor in full.items()
    }


def tensor_parallel(name: str) -> list[Any]:
    return [Split(0) if name in ROWS else Split(1) if name in COLUMNS else Replicate()]


def zeroed(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def local(tensor: Any) -> torch.Tensor:
    part: torch.Tensor = tensor.detach().to_local() if is_sharded(tensor) else tensor.detach()
    return part


def compare(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], reports: list[LoadReport]
) -> dict[str, Any]:
    """Of what this process holds, what differs in any byte, and what was read for it."""
    pairs = {name: (local(found[name]), local(tensor)) for name, tensor in wanted.items()}
    as_bytes = {
        name: [part.contiguous().view(-1).view(torch.uint8) for part in pair]
        for name, pair in pairs.items()
    }
    return {
        "tensors": len(pairs),
        "different": [
            name for name, (ours, theirs) in as_bytes.items() if not torch.equal(ours, theirs)
        ],
        "needed": sum(ours.numel() for ours, _ in as_bytes.values()),
        "nbytes": sum(report.nbytes for report in reports),
        "read_nbytes": sum(report.read_nbytes for report in reports),
    }


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(26, 50)
        self.down = nn.Linear(50, 26)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


def mlp(full: Tensors) -> Mlp:
    model = Mlp()
    model.load_state_dict({name: full[name] for name in model.state_dict()})
    return model


def on_meta() -> Mlp:
    with torch.device("meta"):
        return Mlp()


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    fully_shard(model, mesh=mesh)
    return model


# -- the layouts: how each is published, by so many ranks, and how it is loaded, by so many
# --------------------------------------


def publish_tp(job: Job, name: str, size: int) -> None:
    tensors = placed(whole(), job.meshes[size,], tensor_parallel)
    job.stack.enter_context(
        publish(job.registry, job.engine, tensors=tensors, **job.instance(name, size))
    )


def publish_fsdp(job: Job, name: str, size: int) -> None:
    model = fully_sharded(mlp(whole()), job.meshes[size,])
    job.stack.enter_context(
        publish_state_dict(job.registry, job.engine, model.state_dict(), **job.instance(name, size))
    )


def publish_fsdp_over_tp(job: Job, name: str, size: int) -> None:
    """Tensor parallel along the second dimension of the mesh, and each of these parts sharded along
    the first.
    """
    mesh = job.meshes[2, 2]
    model = parallelize_module(mlp(whole()), mesh["tp"], TENSOR_PARALLEL)
    sharded = fully_sharded(model, mesh["dp"])
    job.stack.enter_context(
        publish_state_dict(
            job.registry, job.engine, sharded.state_dict(), **job.instance(name, size)
        )
    )


def publish_stages(job: Job, name: str, size: int) -> None:
    mine = {
        key: tensor
        for number, (key, tensor) in enumerate(whole().items())
        if number % size == job.rank
    }
    job.stack.enter_context(
        publish_state_dict(job.registry, job.engine, mine, **job.instance(name, size))
    )


def publish_experts(job: Job, name: str, size: int) -> None:
    tensors, shards = experts_of(job.rank, size)
    job.stack.enter_context(
        publish(
            job.registry, job.engine, tensors=tensors, shards=shards, **job.instance(name, size)
        )
    )


def publish_two_dimensions(job: Job, name: str, size: int) -> None:
    """Replicas along the first, and one tensor that is split both ways."""

    def placements(key: str) -> list[Any]:
        return [Split(1), Split(0)] if key == "rows" else [Replicate(), *tensor_parallel(key)]

    tensors = placed(whole(), job.meshes[2, 2], placements)
    job.stack.enter_context(
        publish_state_dict(
            job.registry, job.engine, {"model": tensors, "step": 5}, **job.instance(name, size)
        )
    )


def experts_of(rank: int, size: int) -> tuple[Tensors, dict[str, Shard]]:
    full = whole()["experts"]
    each = len(full) // size
    return {"experts": full[rank * each :][:each].clone()}, {
        "experts": Shard(tuple(full.shape), (rank * each, 0, 0))
    }


def read_tp(job: Job, name: str, size: int) -> dict[str, Any]:
    mesh = job.meshes[size,]
    wanted = placed(whole(), mesh, tensor_parallel)
    found, reader = zeroed(wanted), job.reader(name)
    dcp_load(found, storage_reader=reader, process_group=mesh.get_group())
    return compare(found, wanted, reader.reports)


def load_tp(job: Job, name: str, size: int) -> dict[str, Any]:
    wanted = placed(whole(), job.meshes[size,], tensor_parallel)
    found = zeroed(wanted)
    report = load(job.registry, job.engine, name, rank=job.rank, tensors=found)
    return compare(found, wanted, [report])


def read_nested(job: Job, name: str, size: int) -> dict[str, Any]:
    mesh = job.meshes[size,]
    wanted = placed(whole(), mesh, lambda key: [Split(0) if whole()[key].ndim else Replicate()])
    found: dict[str, Any] = {"model": zeroed(wanted), "step": 0}
    reader = job.reader(name, verify="header")
    dcp_load(found, storage_reader=reader, process_group=mesh.get_group())
    return {**compare(found["model"], wanted, reader.reports), "step": found["step"]}


def load_module_tp(job: Job, name: str, size: int) -> dict[str, Any]:
    mesh = job.meshes[size,]
    model, wanted = (
        parallelize_module(made, mesh, TENSOR_PARALLEL) for made in (on_meta(), mlp(whole()))
    )
    report = load_module(job.registry, job.engine, name, model)
    return {
        **compare(dict(model.named_parameters()), dict(wanted.named_parameters()), [report]),
        "runs": runs(model),
    }


def load_module_fsdp(job: Job, name: str, size: int) -> dict[str, Any]:
    model, wanted = (fully_sharded(made, job.meshes[size,]) for made in (on_meta(), mlp(whole())))
    report = load_module(job.registry, job.engine, name, model)
    return {
        **compare(dict(model.named_parameters()), dict(wanted.named_parameters()), [report]),
        "runs": runs(model),
    }


def runs(model: nn.Module) -> bool:
    """It computes what a module in one process does."""
    x = torch.linspace(-1, 1, 26).repeat(2, 1)
    with torch.no_grad():
        return torch.allclose(local(model(x)), mlp(whole())(x), atol=1e-5)


def load_all(job: Job, name: str, size: int) -> dict[str, Any]:
    wanted = whole()
    found = zeroed(wanted)
    shards = {key: Shard(tuple(tensor.shape), (0,) * tensor.ndim) for key, tensor in wanted.items()}
    return compare(
        found, wanted, [load(job.registry, job.engine, name, tensors=found, shards=shards)]
    )


def load_experts(job: Job, name: str, size: int) -> dict[str, Any]:
    wanted, shards = experts_of(job.rank, size)
    found = zeroed(wanted)
    return compare(
        found,
        wanted,
        [
            load(
                job.registry,
                job.engine,
                name,
                tensors=found,
                shards=shards,
                options=LoadOptions(verify="header"),
            )
        ],
    )


def training(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
    """An FSDP model, its optimizer before the first step, and the state of that."""
    model = fully_sharded(mlp(whole()), mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, optimizer, get_optimizer_state_dict(model, optimizer)


def moments(state: dict[str, Any]) -> Tensors:
    return {
        f"{name}.{key}": one[key]
        for name, one in state["state"].items()
        for key in ("exp_avg", "exp_avg_sq")
    }


def known_moments(state: dict[str, Any], mesh: DeviceMesh) -> Tensors:
    full = {name: whole()[name.rpartition(".")[0]] + len(name) for name in moments(state)}
    return placed(full, mesh, lambda _: [Split(0)])


def publish_training(job: Job, name: str, size: int) -> None:
    mesh = job.meshes[size,]
    model, _, state = training(mesh)
    known = known_moments(state, mesh)
    for key, tensor in moments(state).items():
        tensor.copy_(known[key])
    served = {"model": model.state_dict(), "optimizer": state}
    job.stack.enter_context(
        publish_state_dict(job.registry, job.engine, served, **job.instance(name, size))
    )


def read_training(job: Job, name: str, size: int) -> dict[str, Any]:
    mesh = job.meshes[size,]
    model, optimizer, state = training(mesh)
    reader = job.reader(name)
    dcp_load({"optimizer": state}, storage_reader=reader, process_group=mesh.get_group())
    set_optimizer_state_dict(model, optimizer, state)
    found = get_optimizer_state_dict(model, optimizer)
    steps = [one["step"].nbytes for one in state["state"].values()]
    answer = compare(moments(found), known_moments(found, mesh), reader.reports)
    return {**answer, "needed": answer["needed"] + sum(steps)}


LAYOUTS: dict[
    str, tuple[Callable[[Job, str, int], None], int, Callable[[Job, str, int], dict[str, Any]], int]
] = {
    "tp-2-to-tp-3": (publish_tp, 2, read_tp, 3),
    "tp-4-to-tp-2": (publish_tp, 4, load_tp, 2),
    "fsdp-4-to-tp-2": (publish_fsdp, 4, load_module_tp, 2),
    "fsdp-2-tp-2-to-tp-2": (publish_fsdp_over_tp, 4, load_module_tp, 2),
    "tp-2-to-fsdp-3": (publish_tp, 2, load_module_fsdp, 3),
    "pp-2-to-1": (publish_stages, 2, load_all, 1),
    "pp-2-to-tp-2": (publish_stages, 2, read_tp, 2),
    "experts-4-to-2": (publish_experts, 4, load_experts, 2),
    "optimizer-fsdp-4-to-3": (publish_training, 4, read_training, 3),
    "dp-2-tp-2-to-rows-3": (publish_two_dimensions, 4, read_nested, 3),
}


# -- what goes wrong in a job
# --------------------------------------------------------------------------------------------------


class UpdatedMeanwhile(DefaultLoadPlanner):
    """All processes have planned, and none has read, when rank 0 of them, which serves the weights
    too, changes them.
    """

    def __init__(self, update: Callable[[], None]) -> None:
        super().__init__()
        self._update = update

    def finish_plan(self, new_plan: LoadPlan) -> LoadPlan:
        dist.barrier()
        self._update()
        dist.barrier()
        return super().finish_plan(new_plan)


def failures(**arguments: Any) -> dict[str, str]:
    """By rank, what a load fails with."""
    try:
        dcp_load(**arguments)
    except CheckpointException as exc:
        return {
            str(rank): f"{type(why).__name__}: {why}" for rank, (why, _) in exc.failures.items()
        }
    return {}


def updated_meanwhile(job: Job) -> dict[str, Any]:
    served, found = {"w": torch.ones(1000)}, {"w": torch.zeros(1000)}
    with ExitStack() as stack:
        publication = None
        if job.rank == 0:
            publication = stack.enter_context(
                publish_state_dict(job.registry, job.engine, served, **job.instance("trainer", 1))
            )

        def update() -> None:
            if publication is not None:
                with publication.update():
                    served["w"].fill_(2)

        messages = failures(
            state_dict=found, storage_reader=job.reader("trainer"), planner=UpdatedMeanwhile(update)
        )
        dist.barrier()
        values = found["w"].unique().tolist()
        dcp_load(found, storage_reader=job.reader("trainer"))
        dist.barrier()
        return {"failures": messages, "values": values, "then": found["w"].unique().tolist()}


def nobody(job: Job) -> dict[str, Any]:
    return {
        "failures": failures(
            state_dict={"w": torch.zeros(3)}, storage_reader=job.reader("nobody", timeout_s=0.2)
        )
    }


TROUBLES: dict[str, Callable[[Job], dict[str, Any]]] = {
    "updated meanwhile": updated_meanwhile,
    "nobody": nobody,
}


def answer(job: Job, name: str) -> dict[str, Any] | None:
    if name in TROUBLES:
        return TROUBLES[name](job)
    _, _, fill, size = LAYOUTS[name]
    return fill(job, name, size) if job.rank < size else None


def main(side: str, rank: str, size: str, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    meshes = {
        shape: DeviceMesh(
            "cpu",
            torch.arange(math.prod(shape)).reshape(shape),
            mesh_dim_names=("dp", "tp")[-len(shape) :],
        )
        for shape in MESHES[side]
    }
    with (
        engine_log(),
        connect() as registry,
        MooncakeEngine("127.0.0.1") as engine,
        ExitStack() as stack,
    ):
        job = Job(registry, engine, int(rank), meshes, stack)
        if side == "source":
            for name, (offer, ranks, _, _) in LAYOUTS.items():
                if job.rank < ranks:
                    offer(job, name, ranks)
            print("published", flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(job, line.strip())), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
