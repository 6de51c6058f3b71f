"""engine-registry: which inference engines hold which weights, and where. Needs neither torch nor a
transfer engine.

A public name is imported from its module when it is first used: so this package is imported at
once, and its errors without torch.
"""

import logging
from typing import TYPE_CHECKING

from engine_registry.lazy import lazily

if TYPE_CHECKING:
    from engine_registry.client import Registry as Registry
    from engine_registry.errors import AnswerTooLarge as AnswerTooLarge
    from engine_registry.errors import EngineRegistryError as EngineRegistryError
    from engine_registry.errors import EtcdError as EtcdError
    from engine_registry.errors import EtcdFull as EtcdFull
    from engine_registry.errors import EtcdRefused as EtcdRefused
    from engine_registry.errors import EtcdUnavailable as EtcdUnavailable
    from engine_registry.errors import Evicted as Evicted
    from engine_registry.errors import GatewayFailed as GatewayFailed
    from engine_registry.errors import HistoryLost as HistoryLost
    from engine_registry.errors import InstanceIncomplete as InstanceIncomplete
    from engine_registry.errors import InstanceMismatch as InstanceMismatch
    from engine_registry.errors import InstanceNotFound as InstanceNotFound
    from engine_registry.errors import InvalidField as InvalidField
    from engine_registry.errors import KeeperFailed as KeeperFailed
    from engine_registry.errors import LeaseNotFound as LeaseNotFound
    from engine_registry.errors import LocalEtcdFailed as LocalEtcdFailed
    from engine_registry.errors import MetricsUnavailable as MetricsUnavailable
    from engine_registry.errors import RankConflict as RankConflict
    from engine_registry.errors import RecordDamaged as RecordDamaged
    from engine_registry.errors import RegistrationLost as RegistrationLost
    from engine_registry.errors import RegistryError as RegistryError
    from engine_registry.errors import ReleaseIncomplete as ReleaseIncomplete
    from engine_registry.errors import SchemaUnsupported as SchemaUnsupported
    from engine_registry.errors import Superseded as Superseded
    from engine_registry.holders.query import HolderQuery as HolderQuery
    from engine_registry.holders.query import Holders as Holders
    from engine_registry.holders.waiting import HolderWatch as HolderWatch
    from engine_registry.pulls.follow import AllPulls as AllPulls
    from engine_registry.pulls.ticket import PullTicket as PullTicket
    from engine_registry.pulls.watch import PullWatch as PullWatch
    from engine_registry.registration.handle import Registration as Registration
    from engine_registry.registration.handle import RegistrationState as RegistrationState
    from engine_registry.registration.held import Kept as Kept
    from engine_registry.registration.held import keepers_here as keepers_here
    from engine_registry.registration.held import let_go as let_go
    from engine_registry.registration.held import let_go_of_device as let_go_of_device
    from engine_registry.registration.hold import Hold as Hold
    from engine_registry.schema.eviction import Eviction as Eviction
    from engine_registry.schema.location import Location as Location
    from engine_registry.schema.manifest import Manifest as Manifest
    from engine_registry.schema.manifest import Region as Region
    from engine_registry.schema.manifest import TensorEntry as TensorEntry
    from engine_registry.schema.place import Place as Place
    from engine_registry.schema.pull_ticket import Pull as Pull
    from engine_registry.schema.record import ModelIdentity as ModelIdentity
    from engine_registry.schema.record import RankRecord as RankRecord
    from engine_registry.schema.record import RankState as RankState
    from engine_registry.schema.record import new_incarnation as new_incarnation
    from engine_registry.schema.release import Release as Release
    from engine_registry.schema.status import InstanceState as InstanceState
    from engine_registry.schema.status import InstanceStatus as InstanceStatus
    from engine_registry.watching.cleanup import CleaningWatch as CleaningWatch
    from engine_registry.watching.cleanup import InstanceCleaned as InstanceCleaned
    from engine_registry.watching.election import Election as Election
    from engine_registry.watching.events import Event as Event
    from engine_registry.watching.events import InstanceDegraded as InstanceDegraded
    from engine_registry.watching.events import InstanceGone as InstanceGone
    from engine_registry.watching.events import InstanceReady as InstanceReady
    from engine_registry.watching.events import RankJoined as RankJoined
    from engine_registry.watching.events import RankLost as RankLost
    from engine_registry.watching.events import RankUpdated as RankUpdated
    from engine_registry.watching.events import VersionReleased as VersionReleased
    from engine_registry.watching.follow import AllInstances as AllInstances
    from engine_registry.watching.watch import Watch as Watch

_MODULE_OF = {
    "AllInstances": "watching.follow",
    "AllPulls": "pulls.follow",
    "AnswerTooLarge": "errors",
    "CleaningWatch": "watching.cleanup",
    "Election": "watching.election",
    "EngineRegistryError": "errors",
    "EtcdError": "errors",
    "EtcdFull": "errors",
    "EtcdRefused": "errors",
    "EtcdUnavailable": "errors",
    "Event": "watching.events",
    "Evicted": "errors",
    "Eviction": "schema.eviction",
    "GatewayFailed": "errors",
    "HistoryLost": "errors",
    "Hold": "registration.hold",
    "HolderQuery": "holders.query",
    "HolderWatch": "holders.waiting",
    "Holders": "holders.query",
    "InstanceCleaned": "watching.cleanup",
    "InstanceDegraded": "watching.events",
    "InstanceGone": "watching.events",
    "InstanceIncomplete": "errors",
    "InstanceMismatch": "errors",
    "InstanceNotFound": "errors",
    "InstanceReady": "watching.events",
    "InstanceState": "schema.status",
    "InstanceStatus": "schema.status",
    "InvalidField": "errors",
    "KeeperFailed": "errors",
    "Kept": "registration.held",
    "LeaseNotFound": "errors",
    "LocalEtcdFailed": "errors",
    "Location": "schema.location",
    "Manifest": "schema.manifest",
    "MetricsUnavailable": "errors",
    "ModelIdentity": "schema.record",
    "Place": "schema.place",
    "Pull": "schema.pull_ticket",
    "PullTicket": "pulls.ticket",
    "PullWatch": "pulls.watch",
    "RankConflict": "errors",
    "RankJoined": "watching.events",
    "RankLost": "watching.events",
    "RankRecord": "schema.record",
    "RankState": "schema.record",
    "RankUpdated": "watching.events",
    "RecordDamaged": "errors",
    "Region": "schema.manifest",
    "Registration": "registration.handle",
    "RegistrationLost": "errors",
    "RegistrationState": "registration.handle",
    "Registry": "client",
    "RegistryError": "errors",
    "Release": "schema.release",
    "ReleaseIncomplete": "errors",
    "SchemaUnsupported": "errors",
    "Superseded": "errors",
    "TensorEntry": "schema.manifest",
    "VersionReleased": "watching.events",
    "Watch": "watching.watch",
    "keepers_here": "registration.held",
    "let_go": "registration.held",
    "let_go_of_device": "registration.held",
    "new_incarnation": "schema.record",
}

__all__ = [*_MODULE_OF]

logging.getLogger(__name__).addHandler(logging.NullHandler())  # quiet until somebody listens

if not TYPE_CHECKING:  # to a type checker the names above are all that there are
    __getattr__, __dir__ = lazily(__name__, _MODULE_OF)
