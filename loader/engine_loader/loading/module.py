"""`load_module`: a torch module is filled with the weights of a running instance, also one that has
no memory yet.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from engine_loader.engines.base import Engine
from engine_loader.errors import TensorsUnusable, WeightsMismatch, listed
from engine_loader.loading.load import load
from engine_loader.loading.released import load_released
from engine_loader.loading.report import LoadReport
from engine_loader.options import RELEASED, LoadOptions
from engine_loader.planning.near_name import near_name
from engine_loader.publishing.replica import Replica
from engine_loader.sources.holdings import Holdings, read_holdings
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.shards import Shard
from engine_loader.tensors.state_dict import whole
from engine_registry import Registry
from engine_registry.schema.numbers import seconds
from engine_registry.schema.printable import short
from engine_registry.watching.waiting import Wanted


def load_module(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    module: nn.Module,
    *,
    rank: int | None = None,
    device: torch.device | str | None = None,
    prefix: str = "",
    shards: Mapping[str, Shard] | None = None,
    timeout_s: float = 60.0,
    world_size: int | None = None,
    topology: Mapping[str, tuple[int, int]] | None = None,
    publish: bool | str | Replica = False,
    options: LoadOptions = LoadOptions(),
) -> LoadReport:
    """Fills a torch module with the weights of a running instance.

    All entries of `module.state_dict()` are filled: parameters and persistent buffers. Where the
    ranks of the source say which box of the whole they hold, a plain tensor here stands for the
    whole, unless it has a shard. Else it stands for the tensor of the same rank.

    A tensor on the meta device gets memory, and takes its place in the module once everything has
    been loaded. Tied weights stay tied. If the load fails, the module stays as it was. Only tensors
    that had memory before may hold a part then, as after a `load` that failed.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: As for `load`.
        module: The module to fill, in place.
        rank: The rank of the source whose tensors these are. By default that of this process in
            its job, if the job has as many ranks as the source.
        device: Where tensors on the meta device get their memory. By default the device of their
            mesh, else torch's default device, else the host's memory.
        prefix: What stands before the module's names at the source, such as `model.`. A source of
            more than these tensors also takes `LoadOptions(partial=True)`.
        shards: Which part of the whole a tensor is, by its name in the module.
        timeout_s: How many seconds to wait until a source is ready.
        world_size: As for `load`.
        topology: As for `load`.
        publish: As for `load`.
        options: How to choose, read and check; see LoadOptions.

    Returns:
        What the load did.

    Raises:
        TensorsUnusable: A buffer that no state dict has is on the meta device, or a tensor cannot
            be filled.
        WeightsMismatch: Source and module differ. If that may be because of names, the error says
            which `prefix` may have been meant.
        LoaderError: What `load` raises.
        RegistryError: What `load` raises.
    """
    if options.version == RELEASED:
        return load_released(
            registry,
            source,
            options,
            seconds("timeout_s", timeout_s),
            lambda pinned, wait_s: load_module(
                registry,
                engine,
                source,
                module,
                rank=rank,
                device=device,
                prefix=prefix,
                shards=shards,
                timeout_s=wait_s,
                world_size=world_size,
                topology=topology,
                publish=publish,
                options=pinned,
            ),
        )
    start = time.monotonic()
    own = module.state_dict(keep_vars=True)
    tensors: dict[str, torch.Tensor] = {prefix + name: tensor for name, tensor in own.items()}
    shards = {prefix + name: shard for name, shard in (shards or {}).items()}
    check_all_can_be_filled(module, tensors)
    made: dict[torch.Tensor, torch.Tensor] = {}  # by what they replace
    for name, tensor in tensors.items():
        if tensor.is_meta and not is_lazy(tensor):
            if tensor not in made:
                made[tensor] = _with_memory(name, tensor, device)
            tensors[name] = made[tensor]
    holdings = read_holdings(registry, engine, source, rank, timeout_s, options)
    plain = {name: box for name, box in whole(tensors).items() if name not in shards}
    holdings.check_rank_known(plain)
    try:
        report = load(
            registry,
            engine,
            source,
            rank=holdings.rank,
            tensors=tensors,
            shards={**_stated(plain, tensors, holdings), **shards},
            timeout_s=max(0.0, timeout_s - (time.monotonic() - start)),
            world_size=world_size,
            topology=topology,
            publish=publish,
            options=options,
        )
    except WeightsMismatch as exc:
        raise WeightsMismatch(
            exc.what, _other_names(own, prefix, holdings) or exc.remedy, **exc.details
        ) from exc
    for part in module.modules():
        for kind in (part.named_parameters, part.named_buffers):
            for name, tensor in list(kind(recurse=False, remove_duplicate=False)):
                if tensor in made:
                    setattr(part, name, made[tensor])
    return report


def _stated(
    boxes: Mapping[str, Shard], tensors: Mapping[str, torch.Tensor], holdings: Holdings
) -> dict[str, Shard]:
    """The boxes that the source states, for all names of a tensor: it may lack some of them."""
    silent = {id(tensor) for name, tensor in tensors.items() if not holdings.states_box_of(name)}
    return {name: box for name, box in boxes.items() if id(tensors[name]) not in silent}


def _other_names(own: Collection[str], prefix: str, holdings: Holdings) -> str:
    """What to do where the source has the tensors by longer or shorter names; else nothing."""
    for name in own:
        there = near_name(name, holdings.tensors) if prefix + name not in holdings.tensors else ""
        if there.endswith(f".{name}"):
            return f"did you mean prefix={there.removesuffix(name)!r}?"
        if there and name.endswith(f".{there}"):
            part = name.removesuffix(f".{there}")
            return f"did you mean the part of the module that is called {part!r}?"
    return ""


def check_all_can_be_filled(module: nn.Module, tensors: Mapping[str, object]) -> None:
    """TensorsUnusable names what would be left without a value, or be filled where the module does
    not see it.
    """
    own = {
        id(tensor): (name, tensor)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    in_state_dict = set(map(id, tensors.values()))
    left_out = [
        name
        for number, (name, tensor) in own.items()
        if tensor.is_meta and number not in in_state_dict
    ]
    if left_out:
        raise TensorsUnusable(
            f"{len(left_out)} tensors of the module are on the meta device and not in its "
            "state dict, so no source has them: "
            f"{listed(left_out)}",
            "give them their values first: build the module with only its parameters on the meta "
            "device, or call to_empty and the model's own initialisation before the load",
            problems=left_out,
        )
    foreign = [name for name, tensor in tensors.items() if id(tensor) not in own]
    if foreign:
        raise TensorsUnusable(
            f"{len(foreign)} entries of the module's state dict are no parameters or buffers "
            "of it, but made by a hook: "
            f"{listed(foreign)}",
            "fill them with `load` or EngineReader, and then call load_state_dict",
            problems=foreign,
        )


def _with_memory(
    name: str, tensor: torch.Tensor, device: torch.device | str | None
) -> torch.Tensor:
    """Like it, with whatever the memory holds."""
    where = device if device is not None else _default_device(tensor)
    with plain_torch():
        try:
            made = torch.empty_like(tensor.detach(), device=where)
        except Exception as exc:
            said = short(" ".join(str(exc).split()))
            raise TensorsUnusable(
                f"{name} is on the meta device, and memory for a {type(tensor).__name__} on "
                f"{where} cannot be had ({said})",
                "give it memory before the load, or name another `device`",
                problems=[name],
            ) from exc
        if not isinstance(tensor, nn.Parameter):
            return made
        parameter = nn.Parameter(made, requires_grad=tensor.requires_grad)
        vars(parameter).update(vars(tensor))  # engines hang loaders and layouts on their parameters
        return parameter


def _default_device(tensor: Any) -> torch.device | str:
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is not None:
        return str(mesh.device_type)
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default
