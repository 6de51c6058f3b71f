"""Copies the weights of running engines from memory to memory, found through `registry`."""

from loader.engine import Engine
from loader.errors import LoaderError
from loader.in_process import InProcessEngine
from loader.load import LoadReport, load
from loader.load_instance import load_instance
from loader.mooncake_engine import MooncakeEngine
from loader.publish import Publication, publish
from loader.regions import Shard
from loader.transfer import Pace, Progress

__all__ = [
    "Engine",
    "InProcessEngine",
    "LoadReport",
    "LoaderError",
    "MooncakeEngine",
    "Pace",
    "Progress",
    "Publication",
    "Shard",
    "load",
    "load_instance",
    "publish",
]
