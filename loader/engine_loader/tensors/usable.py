"""Why a tensor cannot be published or filled as it is: what it is instead of plain memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import UninitializedBuffer, UninitializedParameter

from engine_loader.errors import TensorsUnusable, listed
from engine_registry.schema.manifest import dense_strides
from engine_registry.schema.printable import is_unicode, short


def references(tensor: torch.Tensor) -> int:
    """How many refer to its memory: tensors of Python, and whatever else."""
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1  # that of `storage`


def unusable_name(name: object) -> str:
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}, not a string"
    return "" if is_unicode(name) else "its name is not text: it has half of a surrogate pair"


def unusable(tensor: object) -> str:
    """Nothing where it is plain memory. Subclasses may answer torch's questions with any error."""
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    try:
        return (
            _of_another_kind(tensor)
            or _without_memory(tensor)
            or _of_another_order(tensor)
            or _outside_storage(tensor)
        )
    except Exception as exc:  # noqa: BLE001
        reason = short(" ".join(str(exc).split()))
        return f"is a {_kind(tensor)} that torch cannot look at ({reason}): {_REMEDY}"


_REMEDY = "give the plain tensors that it is made of, each under a name"


def _of_another_kind(tensor: torch.Tensor) -> str:
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return (
            "is not initialized and has no shape yet: run its module once, or call "
            ".materialize(shape) first"
        )
    if tensor.is_nested:
        return (
            "is a nested tensor, which is several in one: give the tensors of .unbind(), each "
            "under a name"
        )
    if tensor.layout is not torch.strided:
        return (
            f"has layout {tensor.layout}: only dense (strided) tensors have memory that can "
            "be copied as it is: call .to_dense() "
            "first, or give the tensors that it is made of"
        )
    if tensor.device.type == "meta":
        return "is on the meta device and has no memory: allocate it first"
    if tensor.is_quantized:
        return (
            "is a quantized tensor, whose scale lies outside its memory: give .int_repr() and "
            "the scale"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return (
            "belongs to a function that torch.func transforms (vmap, grad): give the tensor from "
            "outside of it"
        )
    return ""


def _without_memory(tensor: torch.Tensor) -> str:
    if not tensor.numel():
        return ""
    try:
        storage = tensor.untyped_storage()
        if not storage.nbytes():
            return "has no memory: its storage was freed"
        there = storage.data_ptr() != 0
    except (RuntimeError, NotImplementedError):
        there = False
    return "" if there else f"is a {_kind(tensor)} without its own memory: {_remedy_for(tensor)}"


def _remedy_for(tensor: Any) -> str:
    if _kind(tensor) == "FakeTensor":
        return "make it outside of FakeTensorMode"
    if _kind(tensor) in ("Tensor", "Parameter", "FunctionalTensor"):
        return "give one from outside of what torch traces"
    if not hasattr(tensor, "__tensor_flatten__"):
        return _REMEDY
    names, _ = tensor.__tensor_flatten__()
    return f"{_REMEDY} ({', '.join(map(str, names))})"


def _of_another_order(tensor: torch.Tensor) -> str:
    if not is_dense(tensor):
        return (
            f"is not contiguous (shape {list(tensor.shape)}, strides {list(tensor.stride())}): "
            "call .contiguous() first"
        )
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazily conjugated or negated view: call .resolve_conj().resolve_neg() first"
    return ""


def _outside_storage(tensor: torch.Tensor) -> str:
    """Of a dense tensor."""
    if not tensor.numel():
        return ""
    nbytes = tensor.untyped_storage().nbytes()
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    return (
        ""
        if end <= nbytes
        else f"reaches to byte {end} of a storage that has {nbytes}: it was resized"
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Contiguous, or so in another order of its dimensions."""
    if tensor.is_contiguous():
        return True
    try:
        dense_strides(tensor.shape, tensor.stride())
    except ValueError:
        return False
    return True


def _kind(tensor: Any) -> str:
    return type(tensor).__name__


def refuse_unusable(problems: Sequence[str]) -> None:
    """Raises TensorsUnusable, with all that is wrong, if anything is."""
    if problems:
        raise TensorsUnusable(
            f"{len(problems)} tensor{'s' if len(problems) > 1 else ''} cannot be used as is: "
            f"{listed(problems)}",
            problems=list(problems),
        )
