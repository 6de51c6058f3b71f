"""For how long a keeper holds the memory of a rank whose process has ended. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_registry.schema.numbers import MAX_TTL_S, seconds
from engine_registry.schema.texts import check_kind, check_texts

HOST = "host"


@dataclass(frozen=True)
class Hold:
    """What happens to the memory of a rank whose process ends without leaving the registry: its
    keeper holds it, so that a process that is started in its place can adopt it.

    Attributes:
        seconds: For how long, from the end of the process; a day at most.
        devices: Where the memory lies: `host`, or `GPU-<uuid>` as nvidia-smi prints it.

    Raises:
        InvalidField: One of them is not valid.
    """

    seconds: float
    devices: tuple[str, ...] = (HOST,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seconds", seconds("hold.seconds", self.seconds, 0.0, MAX_TTL_S))
        check_kind("hold.devices", self.devices, tuple)
        for device in self.devices:
            check_texts({"hold.devices": device})

    def to_wire(self) -> dict[str, Any]:
        """For the pipe to the keeper."""
        return {"seconds": self.seconds, "devices": list(self.devices)}

    @classmethod
    def from_wire(cls, given: Mapping[str, Any] | None) -> Hold | None:
        """What `to_wire` has made; None of None."""
        return None if given is None else cls(given["seconds"], tuple(given["devices"]))
