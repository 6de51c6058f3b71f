"""The request that a driver of SGLang sends through `update_weights_from_tensor`: which source the
ranks pull. SGLang passes nothing but named tensors on to a custom loader, so it travels as a name.
The tensor is empty: SGLang sends tensors as handles of shared memory, but empty ones by value, so
they reach ranks on other nodes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.options import Version, checked_version
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance
from engine_registry.schema.numbers import seconds

_PREFIX = "engine_registry:"


@dataclass(frozen=True)
class Order:
    """What to pull, and settings in place of those that SGLang was started with."""

    source: str
    version: Version | None = None
    timeout_s: float = 60.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    wait: bool = True

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        check_instance(self.source)
        object.__setattr__(self, "version", checked_version(self.version))
        object.__setattr__(self, "timeout_s", seconds("timeout_s", self.timeout_s))
        IntegrationConfig.of(self.settings)
        if not isinstance(self.wait, bool):
            raise InvalidField(
                f"`wait` {self.wait!r} is not valid: it is true or false", field="wait"
            )

    def encode(self) -> list[tuple[str, torch.Tensor]]:
        """Named tensors for SGLang."""
        return [(_PREFIX + json.dumps(asdict(self)), torch.empty(0, dtype=torch.uint8))]

    @classmethod
    def decode(cls, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Order:
        """The order in what SGLang passes on. InvalidField where it is none."""
        try:
            ((name, _),) = named_tensors
            if not name.startswith(_PREFIX):
                raise ValueError(f"{name[:100]!r} is a tensor")
            return cls(**json.loads(name.removeprefix(_PREFIX)))
        except (TypeError, ValueError) as exc:
            if isinstance(exc, InvalidField):
                raise
            raise InvalidField(
                f"the request to pull weights is not valid: {exc}",
                "send `named_tensors=engine_loader.integrations.sglang.request(SOURCE)`",
                field="named_tensors",
            ) from exc
