"""A device of which most is held: there is no memory for the weights of a model beside those."""

from __future__ import annotations

from typing import Any

import engine_loader.integrations.room
import engine_loader.tensors.deferred


def _none(device: Any) -> int:
    return 0


def fill_device() -> None:
    """In this process, to its end. Of a model for tests any parameter counts as large."""
    vars(engine_loader.integrations.room)["available_nbytes"] = _none
    vars(engine_loader.tensors.deferred)["_LEAST_NBYTES"] = 1
