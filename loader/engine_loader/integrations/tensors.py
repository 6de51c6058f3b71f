"""The tensors of an engine's model: those that a loader of checkpoints fills, and those that the
engine computes with.

Memory that several names show is given once, under the first of them. A view that has gaps or
overlaps cannot be copied as it is, so its whole storage is given, as bytes, under a name that
states the view. Engines whose views differ so differ in names, and do not load from each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from engine_loader.tensors.usable import is_dense

Named = Iterable[tuple[str, torch.Tensor]]


def loaded_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers: what a checkpoint has.

    Args:
        module: The model, with memory.

    Returns:
        The tensors of the module themselves, by name, so that it is seen where one of them is given
        other memory.
    """
    return _once([*module.named_parameters(), *_persistent_buffers(module)])


def runtime_tensors(module: nn.Module, skip: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """All that the module computes with: parameters, all buffers, and bare tensors that hang on its
    modules and their methods of quantisation after post-processing.

    Args:
        module: The model, after post-processing.
        skip: The names of attributes that hold no weights, such as the KV cache.

    Returns:
        The tensors by name. A bare tensor is `MODULE!ATTRIBUTE`.
    """
    return _once([*module.named_parameters(), *module.named_buffers(), *_bare(module, skip)])


def all_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the module is known to refer to, under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
    yield from _bare(module, ())


def aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same memory in tensors that nobody else has: it stays when the others get new memory."""
    return {name: tensor.detach() for name, tensor in tensors.items()}


def memory_of(tensors: Iterable[torch.Tensor]) -> set[int]:
    """The addresses of the storages."""
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in tensors
        if tensor.device.type != "meta" and tensor.numel()
    }


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in module.named_modules():
        for leaf, buffer in part._buffers.items():
            if buffer is not None and leaf not in part._non_persistent_buffers_set:
                yield f"{prefix}.{leaf}" if prefix else leaf, buffer


def _bare(module: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for prefix, part in module.named_modules():
        yield from _held_by(part, f"{prefix}!", skip)
        method = getattr(part, "quant_method", None)
        if method is not None and not isinstance(method, nn.Module):
            yield from _held_by(method, f"{prefix}!quant_method.", skip)


def _held_by(owner: object, prefix: str, skip: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Also in lists and dictionaries of the owner, but not deeper."""
    for leaf, value in list(getattr(owner, "__dict__", {}).items()):
        if leaf in skip or leaf in ("_parameters", "_buffers", "_modules"):
            continue
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{leaf}", value
            continue
        items: Iterable[tuple[object, object]] = ()
        if isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = list(value.items())
        for at, inner in items:
            if isinstance(inner, torch.Tensor):
                yield f"{prefix}{leaf}[{at}]", inner


def _once(named: Named) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    seen: set[tuple[object, ...]] = set()
    whole: set[int] = set()  # storages that are given as bytes
    for name, tensor in named:
        if not tensor.numel() or tensor.device.type == "meta":
            found.setdefault(name, tensor)
            continue
        storage = tensor.untyped_storage()
        view = (
            storage.data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if view in seen:
            continue
        seen.add(view)
        if is_dense(tensor):
            found[name] = tensor
        elif storage.data_ptr() not in whole:
            whole.add(storage.data_ptr())
            found[_of_view(name, tensor)] = torch.empty(
                0, dtype=torch.uint8, device=tensor.device
            ).set_(storage)
        else:  # its bytes are there already; the name states how it lies in them
            found[_of_view(name, tensor)] = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return found


def _of_view(name: str, tensor: torch.Tensor) -> str:
    shape, strides = "x".join(map(str, tensor.shape)), "x".join(map(str, tensor.stride()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name}|{dtype}[{shape}]@{tensor.storage_offset()}/{strides}"
