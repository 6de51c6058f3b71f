"""Torch tensors as memory: what a transfer engine has to register, and what the manifest says of
each tensor.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Mapping
from operator import attrgetter
from typing import Any

import torch

from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.dtypes import dtype_name
from engine_loader.tensors.host_memory import memory_at
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.shards import Shard, local, placed_in
from engine_loader.tensors.usable import refuse_unusable, unusable, unusable_name
from engine_registry.collector import collector_paused
from engine_registry.schema.manifest import Manifest, Region, TensorEntry, dense_strides

_MANY_STORAGES = 1_000
Places = list[list[Any]]
_SHAPE, _DTYPE = attrgetter("shape"), attrgetter("dtype")


@collector_paused
@plain_torch()
def describe(
    tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
) -> Manifest:
    """The tensors' entries, in their order, and the regions to register: each storage once, however
    many views it has.

    Raises TensorsUnusable with every tensor that is not plain memory without gaps. Tensors without
    bytes need no memory; tensors that share memory (tied weights) keep their common address.
    """
    problems = []
    entries = []
    storages: dict[tuple[int, str], int] = {}  # by address and type of device: how many bytes
    for name, tensor in tensors.items():
        problem = unusable_name(name) or unusable(tensor)
        if problem:
            problems.append(f"{name}: {problem}")
            continue
        addr, nbytes = (tensor.data_ptr(), tensor.nbytes) if tensor.numel() else (0, 0)
        try:
            entries.append(entry_of(name, tensor, addr, shards.get(name) if shards else None))
        except ValueError as exc:
            problems.append(f"{name}: {exc}")
            continue
        if nbytes:
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), tensor.device.type
            storages[key] = max(storages.get(key, 0), storage.nbytes())
    problems += [
        f"{name}: has a shard, but is not among the tensors"
        for name in shards or ()
        if name not in tensors
    ]
    refuse_unusable(problems)
    return Manifest(tuple(entries), _regions(storages))


def entry_of(name: str, tensor: torch.Tensor, addr: int, shard: Shard | None) -> TensorEntry:
    """Of a dense tensor, as if it lay at that address. ValueError where the shard is not one of
    such a tensor.
    """
    shape = tuple(tensor.shape)
    whole, offsets, slices = shape, (0,) * len(shape), None
    if shard is not None:
        whole, (offsets, slices) = shard.global_shape, placed_in(shape, shard)
    return TensorEntry(
        name,
        dtype_name(tensor.dtype),
        shape,
        addr,
        tensor.nbytes,
        whole,
        offsets,
        shard is None,
        strides_of(tensor),
        slices,
    )


def strides_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """None for one that is contiguous."""
    return None if tensor.is_contiguous() else dense_strides(tensor.shape, tensor.stride())


def devices_of(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.device, ...]:
    """Where the weights lie: that of the first tensor that has bytes first; the host's memory if
    none has.
    """
    return tuple(dict.fromkeys(tensor.device for tensor in tensors.values() if tensor.numel())) or (
        torch.device("cpu"),
    )


def _regions(storages: Mapping[tuple[int, str], int]) -> tuple[Region, ...]:
    """Storages that overlap (made from the same foreign buffer) become one region: engines refuse
    to register a byte twice.

    So do neighbours in the host's memory where there are very many: engines that have to list them
    take ever longer, and in the end refuse. They are neighbours if no whole page lies between them:
    all pages of the region are mapped as long as both of them live.
    """
    many = len(storages) > _MANY_STORAGES
    regions: list[tuple[int, int]] = []  # from where to where
    last_end, last_in_host = 0, False
    for (start, device_type), nbytes in sorted(storages.items()):
        end = start + nbytes
        if end <= last_end:
            continue
        in_host = device_type == "cpu"
        if not in_host:
            region = to_register(Region(start, nbytes), device_type)
            start, end = region.addr, region.end
        elif (memory := memory_at(start)) is not None:  # all of an arena is one region
            start, end = memory.region.addr, memory.region.end
            in_host = False  # it is no neighbour of others: peers map it by itself
        near = many and in_host and last_in_host and _page(start) - _page(last_end - 1) <= 1
        if start < last_end or near:
            regions[-1] = regions[-1][0], max(last_end, end)
        else:
            regions.append((start, end))
        last_end, last_in_host = regions[-1][1], in_host
    return tuple(Region(start, end - start) for start, end in regions)


def _page(addr: int) -> int:
    return addr // mmap.PAGESIZE


@collector_paused
def places_of(tensors: Collection[torch.Tensor]) -> Places | None:
    """Where they are, and what: for `in_place`. None where they are not all plain ones."""
    if any(type(tensor) not in _PLAIN for tensor in tensors):
        return None
    return _places(tensors)


@collector_paused
def in_place(tensors: Collection[torch.Tensor], places: Places) -> bool:
    """Whether they are as they were; False also where it takes a closer look."""
    try:
        return _places(tensors) == places
    except Exception:  # noqa: BLE001  they may be anything by now, and raise whatever they like
        return False


def _places(tensors: Collection[torch.Tensor]) -> Places:
    """Of each the address, the shape, the dtype and the strides. Loads ask for them again and
    again, of thousands: so each in a loop that is not Python's.
    """
    addrs, strides = map(torch.Tensor.data_ptr, tensors), map(torch.Tensor.stride, tensors)
    return [list(addrs), list(map(_SHAPE, tensors)), list(map(_DTYPE, tensors)), list(strides)]


def moved(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[str]:
    """One line for each tensor that is not any more what its entry says: of another address, dtype,
    shape or strides.

    A storage that was freed, or given another size, has another address.
    """
    problems = []
    for entry in manifest.tensors:
        tensor: Any = tensors[entry.name]
        if type(tensor) not in _PLAIN:
            tensor = local(tensor)
        try:
            same = _is_as_described(tensor, entry)
        except Exception:  # noqa: BLE001  it may be anything by now, and raise whatever it likes
            same = False
        if not same:
            problems.append(f"{entry.name}: {_change(tensor, entry)}")
    return problems


def _is_as_described(tensor: torch.Tensor, entry: TensorEntry) -> bool:
    return (
        (tensor.data_ptr() if entry.nbytes else 0) == entry.addr
        and tensor.shape == entry.shape
        and dtype_name(tensor.dtype) == entry.dtype
        and (
            tensor.is_contiguous() if entry.strides is None else _has_strides(tensor, entry.strides)
        )
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _has_strides(tensor: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Of a tensor of the same shape: `strides` are dense, and so are equal ones."""
    sides = zip(tensor.shape, tensor.stride(), strict=True)
    return tuple([1 if size == 1 else stride for size, stride in sides]) == strides


def _change(tensor: torch.Tensor, entry: TensorEntry) -> str:
    problem = unusable(tensor)
    if problem:
        return problem
    addr = tensor.data_ptr() if tensor.numel() else 0
    now = f"{tensor.nbytes} bytes of {dtype_name(tensor.dtype)} at {addr:#x}"
    where = f"was {entry.nbytes} bytes at {entry.addr:#x}"
    if (addr, tensor.nbytes) != (entry.addr, entry.nbytes):
        return f"is now {now}, {where}"
    strides = list(tensor.stride())
    return (
        f"is now {now} with shape {list(tensor.shape)} and strides {strides}, {where} with shape "
        f"{list(entry.shape)}"
    )
