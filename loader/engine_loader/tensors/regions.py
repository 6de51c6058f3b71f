"""Torch tensors as memory: what a transfer engine has to register, and what the manifest says of
each tensor.
"""

from __future__ import annotations

import functools
import math
import mmap
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch

from engine_loader.errors import TensorsUnusable, listed
from engine_loader.tensors.cuda import to_register
from engine_loader.tensors.modes import plain_torch
from engine_loader.tensors.usable import unusable, unusable_name
from engine_registry.collector import collector_paused
from engine_registry.errors import InvalidField
from engine_registry.schema.manifest import Manifest, Region, TensorEntry, dense_strides
from engine_registry.schema.numbers import whole
from engine_registry.schema.printable import short

_MANY_STORAGES = 1_000


@dataclass(frozen=True)
class Shard:
    """Which box of the whole tensor a rank's tensor is. The box has the shape of the rank's tensor.

    Attributes:
        global_shape: The shape of the whole tensor, in elements.
        offsets: Where the box begins in the whole, in elements along each dimension.

    Raises:
        TensorsUnusable: A field is no sequence of whole numbers.

    Example:
        `Shard((8, 16), (4, 0))` is the lower half, for a tensor of shape (4, 16).
    """

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        """Takes any sequences of whole numbers. Raises TensorsUnusable."""
        for field in ("global_shape", "offsets"):
            object.__setattr__(self, field, _whole_numbers(field, getattr(self, field)))


def _whole_numbers(field: str, values: Any) -> tuple[int, ...]:
    try:
        if isinstance(values, Set | Mapping):
            raise TypeError("it has no order")
        return tuple([whole(field, value, -sys.maxsize) for value in values])
    except (TypeError, InvalidField) as exc:
        raise TensorsUnusable(
            f"{field} {short(repr(values))} of a shard is not valid: it has a whole number "
            "for each dimension",
            field=field,
        ) from exc


def is_sharded(tensor: object) -> bool:
    """It says itself which part of the whole it is: a DTensor."""
    return hasattr(tensor, "__create_chunk_list__") and hasattr(tensor, "to_local")


@plain_torch()
def local_parts(
    tensors: Mapping[str, torch.Tensor], shards: Mapping[str, Shard] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Shard]]:
    """What this process holds of each tensor, and which box of the whole that is, as far as it is
    known.

    A DTensor on a device mesh that this process is not in is left out: it holds nothing of it.
    Raises TensorsUnusable for a DTensor that is a partial sum, or whose part is no box, and for one
    that has a shard stated besides.
    """
    parts, boxes, problems = dict(tensors), dict(shards or {}), []
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            parts[name] = _arrived(tensor)
            continue
        dtensor: Any = tensor
        problem = _no_box(dtensor)
        if not problem and name in boxes:
            problem = "has a shard stated, but is a DTensor, which says itself which part it is"
        if problem:
            problems.append(f"{name}: {problem}")
        elif dtensor.device_mesh.get_coordinate() is None:
            del parts[name]
        else:
            parts[name] = _arrived(dtensor.detach().to_local())
            (chunk,) = dtensor.__create_chunk_list__()
            boxes[name] = Shard(tuple(dtensor.shape), tuple(chunk.offsets))
    _refuse(problems)
    return parts, boxes


def _arrived(tensor: Any) -> Any:
    """The tensor that a collective fills, once it is filled: an AsyncCollectiveTensor wraps it."""
    return tensor.wait() if hasattr(tensor, "trigger_wait") else tensor


def _no_box(dtensor: Any) -> str:
    """Why this process's part of it is no box of the whole.

    A dimension that is split several times is split from left to right, in ever smaller runs; a
    strided placement says that it comes after so many later parts, as data parallelism does on top
    of tensor parallelism. With any other stride there are gaps.
    """
    if any(placement.is_partial() for placement in dtensor.placements):
        return "is a partial sum over its device mesh: call .redistribute() first"
    for axis, placement in enumerate(dtensor.placements):
        stride = getattr(placement, "split_factor", 1)
        sizes = list(zip(dtensor.placements, dtensor.device_mesh.shape, strict=True))[axis + 1 :]
        if stride > 1 and stride != math.prod(
            size for later, size in sizes if later.is_shard(placement.dim)
        ):
            return f"is split with gaps ({placement}): call .redistribute() first"
    return ""


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
        shape = tuple(tensor.shape)
        shard = shards.get(name) if shards else None
        if shard is not None and (problem := _outside(shape, shard)):
            problems.append(f"{name}: {problem}")
            continue
        whole, offsets = (
            (shard.global_shape, shard.offsets) if shard is not None else (shape, (0,) * len(shape))
        )
        strides = strides_of(tensor)
        entries.append(
            TensorEntry(
                name,
                dtype_name(tensor.dtype),
                shape,
                addr,
                nbytes,
                whole,
                offsets,
                shard is None,
                strides,
            )
        )
        if nbytes:
            storage = tensor.untyped_storage()
            key = storage.data_ptr(), tensor.device.type
            storages[key] = max(storages.get(key, 0), storage.nbytes())
    problems += [
        f"{name}: has a shard, but is not among the tensors"
        for name in shards or ()
        if name not in tensors
    ]
    _refuse(problems)
    return Manifest(tuple(entries), _regions(storages))


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


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """TensorsUnusable where this torch has no dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TensorsUnusable(
            f"dtype {name!r} is unknown to torch {torch.__version__}", "upgrade torch", dtype=name
        )
    return dtype


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise TensorsUnusable(
            f"{len(problems)} tensor{'s' if len(problems) > 1 else ''} cannot be used as is: "
            f"{listed(problems)}",
            problems=list(problems),
        )


def _outside(shape: tuple[int, ...], box: Shard) -> str:
    if not len(shape) == len(box.global_shape) == len(box.offsets):
        return f"shard {box} does not have the {len(shape)} dimensions of the tensor"
    fits = all(
        offset >= 0 and offset + size <= whole
        for size, whole, offset in zip(shape, box.global_shape, box.offsets, strict=True)
    )
    return (
        ""
        if fits
        else (
            f"shard at {list(box.offsets)} of shape {list(shape)} does not fit into "
            f"{list(box.global_shape)}"
        )
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
        near = many and in_host and last_in_host and _page(start) - _page(last_end - 1) <= 1
        if start < last_end or near:
            regions[-1] = regions[-1][0], max(last_end, end)
        else:
            regions.append((start, end))
        last_end, last_in_host = regions[-1][1], in_host
    return tuple(Region(start, end - start) for start, end in regions)


def _page(addr: int) -> int:
    return addr // mmap.PAGESIZE


def moved(tensors: Mapping[str, torch.Tensor], manifest: Manifest) -> list[str]:
    """One line for each tensor that is not any more what its entry says: of another address, dtype,
    shape or strides.

    A storage that was freed, or given another size, has another address.
    """
    problems = []
    for entry in manifest.tensors:
        tensor: Any = tensors[entry.name]
        if type(tensor) not in _PLAIN:
            tensor = _arrived(tensor.to_local() if is_sharded(tensor) else tensor)
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
