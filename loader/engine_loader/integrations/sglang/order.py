"""The request that a driver of SGLang sends through `update_weights_from_tensor`: which source the
ranks pull. It travels as a tensor of bytes, as SGLang passes nothing else on to a custom loader.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from engine_loader.integrations.config import IntegrationConfig
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance
from engine_registry.schema.numbers import seconds, whole_or_none

_NAME = "engine_registry"


@dataclass(frozen=True)
class Order:
    """What to pull, and settings in place of those that SGLang was started with."""

    source: str
    version: int | None = None
    timeout_s: float = 60.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        check_instance(self.source)
        object.__setattr__(self, "version", whole_or_none("version", self.version))
        object.__setattr__(self, "timeout_s", seconds("timeout_s", self.timeout_s))
        IntegrationConfig.of(self.settings)

    def encode(self) -> list[tuple[str, torch.Tensor]]:
        """Named tensors for SGLang."""
        text = json.dumps(asdict(self)).encode()
        return [(_NAME, torch.frombuffer(bytearray(text), dtype=torch.uint8))]

    @classmethod
    def decode(cls, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> Order:
        """The order in what SGLang passes on. InvalidField where it is none."""
        tensors = dict(named_tensors)
        try:
            (tensor,) = (tensors[_NAME],)
            if len(tensors) > 1 or tensor.dtype is not torch.uint8:
                raise ValueError("other tensors came")
            return cls(**json.loads(bytes(tensor.cpu().tolist())))
        except (KeyError, TypeError, UnicodeDecodeError, ValueError) as exc:
            if isinstance(exc, InvalidField):
                raise
            raise InvalidField(
                f"the request to pull weights is not valid: {exc}",
                "send `named_tensors=engine_loader.integrations.sglang.request(SOURCE)`",
                field="named_tensors",
            ) from exc
