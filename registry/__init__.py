"""engine-registry: which inference engines hold which weights, and where. Needs neither torch nor a transfer engine."""

import logging

from registry.cleanup import CleaningWatch, InstanceCleaned
from registry.client import Registry, new_incarnation
from registry.errors import RegistryError
from registry.manifest import Manifest, Region, TensorEntry
from registry.place import Place
from registry.record import ModelIdentity, RankRecord, RankState
from registry.resolver import InstanceState, InstanceStatus
from registry.session import Registration, RegistrationState
from registry.tickets import Pull
from registry.watcher import (
    Event,
    InstanceDegraded,
    InstanceGone,
    InstanceReady,
    RankJoined,
    RankLost,
    RankUpdated,
    Watch,
)

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet until somebody listens

__all__ = [
    "CleaningWatch",
    "Event",
    "InstanceCleaned",
    "InstanceDegraded",
    "InstanceGone",
    "InstanceReady",
    "InstanceState",
    "InstanceStatus",
    "Manifest",
    "ModelIdentity",
    "Place",
    "Pull",
    "RankJoined",
    "RankLost",
    "RankRecord",
    "RankState",
    "RankUpdated",
    "Region",
    "Registration",
    "RegistrationState",
    "Registry",
    "RegistryError",
    "TensorEntry",
    "Watch",
    "new_incarnation",
]
