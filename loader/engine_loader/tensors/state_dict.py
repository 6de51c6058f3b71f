"""State dicts as torch's distributed checkpoint has them: nested, with DTensors and with values
that are no tensors.

Values travel in the manifest as JSON, tagged where JSON has no such type. Never as pickles: a
writer to etcd would decide what a loader executes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import torch

from engine_loader.errors import TensorsUnusable, listed
from engine_loader.tensors.shards import Shard, is_sharded
from engine_loader.tensors.usable import unusable
from engine_registry.schema.printable import short

MAX_VALUES_NBYTES = 1 << 20
# and the JSON type of what is tagged
_TAGS = {
    "list": "list",
    "tuple": "list",
    "dict": "list",
    "bytes": "str",
}
_MAX_BITS = 4096  # Python refuses to read numbers of very many digits


def flatten(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Its tensors, and all else in it, by the names that a distributed checkpoint gives them: the
    path, joined by dots.
    """
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict

    try:
        flat, _ = flatten_state_dict(dict(state_dict))
    except ValueError as exc:
        raise TensorsUnusable(
            f"two entries of the state dict have the same name when paths are joined by dots: {exc}"
        ) from exc
    tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in flat.items() if name not in tensors}


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shard]:
    """The boxes of plain tensors, each of which is a whole, as a distributed checkpoint takes it.

    Tensors that cannot be used get none: they may have no shape, and `describe` refuses them.
    """
    return {
        name: Shard(tuple(tensor.shape), (0,) * tensor.ndim)
        for name, tensor in tensors.items()
        if not is_sharded(tensor) and not unusable(tensor)
    }


def encode_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it; TensorsUnusable names what cannot be encoded."""
    encoded, problems = {}, []
    for name, value in values.items():
        try:
            encoded[name] = _encode(value)
        except (TypeError, RecursionError) as exc:
            problems.append(f"{name}: {exc}")
    if problems:
        raise TensorsUnusable(
            f"{len(problems)} values of the state dict are neither tensors nor plain data: "
            f"{listed(problems)}",
            problems=problems,
        )
    nbytes = len(json.dumps(encoded))
    if nbytes > MAX_VALUES_NBYTES:
        raise TensorsUnusable(
            f"the values of the state dict that are no tensors take {nbytes} bytes, "
            f"{MAX_VALUES_NBYTES} is the limit",
            "make tensors of the large ones",
        )
    return encoded


def decode_value(encoded: Any) -> Any:
    """ValueError where it was not made by `encode_values`."""
    try:
        return _decode(encoded)
    except (TypeError, RecursionError) as exc:
        raise ValueError(str(exc)) from exc


def _decode(encoded: Any) -> Any:
    if not isinstance(encoded, dict | list):
        return encoded
    if isinstance(encoded, list) or len(encoded) != 1:
        raise ValueError("a value is not tagged with its type")
    ((tag, content),) = encoded.items()
    if tag not in _TAGS:
        raise ValueError(f"a value has the unknown tag {short(tag)!r}")
    if type(content).__name__ != _TAGS[tag]:
        raise ValueError(f"a value with the tag {tag!r} is a {type(content).__name__}")
    if tag == "list":
        return [_decode(one) for one in content]
    if tag == "tuple":
        return tuple([_decode(one) for one in content])
    if tag == "dict":
        return dict(map(_decode_item, content))
    return base64.b64decode(content, validate=True)


def _decode_item(item: Any) -> tuple[Any, Any]:
    if not isinstance(item, list) or len(item) != 2:
        raise ValueError("a dict holds something that is no pair")
    return _decode(item[0]), _decode(item[1])


def _encode(value: Any) -> Any:
    kind = type(value)
    if kind is int and value.bit_length() > _MAX_BITS:
        raise TypeError(f"is an integer of {value.bit_length()} bits: {_MAX_BITS} is the limit")
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple):
        return {kind.__name__: [_encode(one) for one in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key), _encode(content)] for key, content in value.items()]}
    if kind is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    raise TypeError(
        f"is a {kind.__module__}.{kind.__qualname__}: use numbers, strings, bytes, lists, "
        "tuples and dicts"
    )
