"""Copies the weights of running engines from memory to memory, found through `registry`."""

import logging
from typing import TYPE_CHECKING, Any

from loader.destination import Destination
from loader.engine import Engine
from loader.errors import LoaderError
from loader.in_process import InProcessEngine
from loader.load import load
from loader.load_instance import load_instance
from loader.module import load_module
from loader.mooncake_engine import MooncakeEngine
from loader.pace import Pace
from loader.publish import Publication, publish, publish_state_dict
from loader.regions import Shard
from loader.replica import Replica
from loader.report import LoadReport
from loader.seeding import load_or_seed
from loader.start import Seeded
from loader.transfer import Progress

if TYPE_CHECKING:
    from loader.checkpoint import EngineReader

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet until somebody listens

__all__ = [
    "Destination",
    "Engine",
    "EngineReader",
    "InProcessEngine",
    "LoadReport",
    "LoaderError",
    "MooncakeEngine",
    "Pace",
    "Progress",
    "Publication",
    "Replica",
    "Seeded",
    "Shard",
    "load",
    "load_instance",
    "load_module",
    "load_or_seed",
    "publish",
    "publish_state_dict",
]


def __getattr__(name: str) -> Any:
    """What takes half a second more to import, as it needs torch's distributed checkpoint."""
    if name == "EngineReader":
        from loader.checkpoint import EngineReader

        return EngineReader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
