"""Copies the weights of running engines from memory to memory, found through `registry`."""

from loader.engine import Engine, InProcessEngine, MooncakeEngine
from loader.errors import LoaderError
from loader.load import LoadReport, load
from loader.publish import Publication, publish
from loader.regions import Shard
from loader.transfer import Progress

__all__ = [
    "Engine",
    "InProcessEngine",
    "LoadReport",
    "LoaderError",
    "MooncakeEngine",
    "Progress",
    "Publication",
    "Shard",
    "load",
    "publish",
]
