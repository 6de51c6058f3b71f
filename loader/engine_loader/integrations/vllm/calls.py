"""What vLLM's calls for weight transfer say to `integrations.vllm.transfer`: whom to take weights
from, and which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.options import Version, checked_version
from engine_registry.errors import InvalidField


@dataclass
class TrainerInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Whom to take weights from.

    Attributes:
        source: The instance that the trainer publishes.
        config: How to reach it.
    """

    source: str
    config: IntegrationConfig = field(default_factory=IntegrationConfig)

    @classmethod
    def of(cls, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> TrainerInfo:
        """`source`, and settings in place of the defaults. Raises InvalidField."""
        values = dict(given)
        source = values.pop("source", None)
        if not isinstance(source, str) or not source:
            raise InvalidField(
                f"`source` {source!r} is not valid: it is the instance that the trainer publishes",
                "give the name that the trainer gave to `publish_state_dict`",
                field="source",
            )
        return cls(source, IntegrationConfig.of({**defaults, **values}))


@dataclass
class Step(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which weights to take.

    Attributes:
        version: The version of the trainer's publication. None takes the newest, `"released"` the
            one that the trainer has released.
        wait: Whether to load now what the mirror does not have yet. If not, the update fails then,
            and changes nothing.
    """

    version: Version | None = None
    wait: bool = True

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Step:
        """Raises InvalidField."""
        if unknown := sorted(set(given) - {"version", "wait"}):
            raise InvalidField(
                f"the update has unknown keys: {', '.join(unknown)}",
                "known are version, wait",
                field=unknown[0],
            )
        wait = given.get("wait", True)
        if not isinstance(wait, bool):
            raise InvalidField(f"`wait` {wait!r} is not valid: it is true or false", field="wait")
        return cls(checked_version(given.get("version")), wait)
