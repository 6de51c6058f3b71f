"""Which weights an engine's memory holds, as a `ModelIdentity` by which equal engines find each
other. Pure.

Equal identities promise equal names of tensors, and equal parts of the model in ranks at equal
places. So everything of an engine's configuration that decides about these is part of the identity.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine_registry import ModelIdentity

_LENGTH = 16  # hexadecimal digits: 64 bits, where nobody looks for a collision
# keys of a configuration that differ from machine to machine
_LOCAL = ("name_or_path", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class EngineModel:
    """What an engine knows of a model that it starts.

    Attributes:
        name: Its name.
        revision: The revision of its weights, as far as it is known.
        dtype: The dtype that the engine computes with, such as `bfloat16`.
        quantization: The engine's name of the quantisation. Empty: none.
        engine: The name of the engine.
        stage: Whether peers get the memory as it was loaded, or as the engine has processed it.
        config: The configuration of the model.
        quantization_config: That of its quantisation.
        axes: The sizes of the parallel axes, by name. Empty where all tensors say which part of the
            model they are: then engines of other sizes are equal.
        expert: The index of the rank among those that share the experts, and how many they are.
        build: What decides how the engine lays out its memory, such as its version and its device.
            It is part of the identity for the stage `processed`.
    """

    name: str
    revision: str = ""
    dtype: str = ""
    quantization: str = ""
    engine: str = ""
    stage: str = "loaded"
    config: Mapping[str, Any] = field(default_factory=dict)
    quantization_config: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    expert: tuple[int, int] = (0, 1)
    build: Mapping[str, str] = field(default_factory=dict)

    def identity(self) -> ModelIdentity:
        """The identity by which peers find each other. Raises InvalidField."""
        extra = {
            "engine": self.engine,
            "stage": self.stage,
            "config": fingerprint(self.config),
        }
        if self.axes:
            extra["axes"] = ".".join(f"{name}{size}" for name, size in sorted(self.axes.items()))
        if self.quantization_config:
            extra["quantization_config"] = fingerprint(self.quantization_config)
        if self.expert[1] > 1:
            extra["expert"] = f"{self.expert[0]}/{self.expert[1]}"
        if self.stage == "processed":
            extra |= self.build
        return ModelIdentity(self.name, self.revision, self.dtype, self.quantization, extra)


def fingerprint(config: Mapping[str, Any]) -> str:
    """A hash of a configuration, without what only says where it was read from."""
    text = json.dumps(_portable(config), sort_keys=True, default=_text)
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def _portable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(name): _portable(inner)
            for name, inner in value.items()
            if not str(name).startswith("_") and name not in _LOCAL
        }
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_portable(inner) for inner in value]
    return value


def _text(value: Any) -> str:
    """Never the address of an object, which differs from process to process."""
    if hasattr(value, "value"):  # an enum
        return str(value.value)
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text
