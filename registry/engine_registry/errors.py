"""Every error that `engine_registry` raises on purpose; callers catch these and nothing else.

EngineRegistryError             of this package and of `engine_loader`
└── RegistryError               of this package
    ├── EtcdError               etcd did not do what was asked
    │   ├── EtcdUnavailable     no endpoint answered in time, or what answers is not etcd
    │   ├── EtcdRefused         etcd answered no: credentials, permission, size
    │   │   ├── EtcdFull        it has no space left (NOSPACE): writes do not pass
    │   │   └── AnswerTooLarge  its answer is more than one message may hold: ask for less
    │   ├── LeaseNotFound       the lease has expired or was revoked
    │   └── HistoryLost         the watch cannot go on from where it was
    ├── InvalidField            a name or number outside its range (also a ValueError)
    ├── RecordDamaged           a key holds nothing that can be read
    │   └── SchemaUnsupported   it was written by a newer version
    ├── RankConflict            another process holds this rank
    ├── InstanceMismatch        the rank disagrees with its siblings
    ├── InstanceNotFound        no rank of the instance is registered
    ├── InstanceIncomplete      some ranks are missing or not consistent
    ├── ReleaseIncomplete       some ranks do not hold the version that is to be released
    ├── RegistrationLost        the registration has ended and will not come back
    │   ├── Evicted             it was deleted on purpose
    │   └── Superseded          a newer registration has taken its place
    ├── KeeperFailed            the process that holds the lease cannot be started
    ├── GatewayFailed           the HTTP gateway, or the dashboard, cannot be started
    ├── MetricsUnavailable      metrics were asked for, and prometheus_client is not installed
    └── LocalEtcdFailed         the embedded etcd cannot be started
"""

from __future__ import annotations

from typing import Any


class EngineRegistryError(Exception):
    """The base of every error that the packages raise on purpose.

    Attributes:
        what: what happened, and to which key, tensor or peer.
        remedy: what to do about it, in terms of the library, if there is something to say. Names of
            parameters and calls stand in backticks, so that a command line can put its own in their
            place.
        details: the facts as values that JSON can hold.

    Its text is `what: remedy`.
    """

    def __init__(self, what: str, remedy: str = "", **details: Any) -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy
        self.details = details


class RegistryError(EngineRegistryError):
    """An error of `engine_registry`."""

    def to_wire(self) -> dict[str, Any]:
        """For another process of ours, which reads it with `from_wire`."""
        return {
            "type": type(self).__name__,
            "what": self.what,
            "remedy": self.remedy,
            "details": self.details,
        }


class EtcdError(RegistryError):
    """Etcd did not do what was asked."""


class EtcdUnavailable(EtcdError):
    """No endpoint answered in time, or what answers is not etcd."""


class EtcdRefused(EtcdError):
    """Etcd answered no: credentials, permission, size."""


class EtcdFull(EtcdRefused):
    """It has no space left (NOSPACE): reads, deletions and renewals pass, writes do not."""


class AnswerTooLarge(EtcdRefused):
    """What it answers is more than one message may hold: ask for less at once."""


class LeaseNotFound(EtcdError):
    """The lease has expired or was revoked."""


class HistoryLost(EtcdError):
    """The watch cannot go on from where it was: compacted, or another store."""


class InvalidField(RegistryError, ValueError):
    """A name or number outside its range (also a ValueError)."""


class RecordDamaged(RegistryError):
    """What is stored under a key cannot be read."""


class SchemaUnsupported(RecordDamaged):
    """It was written by a newer version."""


class RankConflict(RegistryError):
    """Another process holds this rank."""


class InstanceMismatch(RegistryError):
    """The rank disagrees with its siblings."""


class InstanceNotFound(RegistryError):
    """No rank of the instance is registered."""


class InstanceIncomplete(RegistryError):
    """Some ranks are missing or not consistent."""


class ReleaseIncomplete(RegistryError):
    """Some ranks do not hold the version that is to be released: `details["ranks"]` says why of
    each, by its number.
    """


class RegistrationLost(RegistryError):
    """The registration has ended and will not come back."""


class Evicted(RegistrationLost):
    """Somebody deleted it on purpose."""


class Superseded(RegistrationLost):
    """A newer registration has taken its place."""


class KeeperFailed(RegistryError):
    """The process that holds the lease cannot be started, or cannot hold or hand out descriptors of
    the rank's memory.
    """


class GatewayFailed(RegistryError):
    """The HTTP gateway, or the dashboard of the command line, cannot be started."""


class MetricsUnavailable(RegistryError):
    """Metrics were asked for, and prometheus_client is not installed."""


class LocalEtcdFailed(RegistryError):
    """The embedded etcd cannot be started."""


def from_wire(data: dict[str, Any]) -> RegistryError:
    """The error that another process of ours sent with `to_wire`."""
    found = globals().get(str(data.get("type")))
    kind = found if isinstance(found, type) and issubclass(found, RegistryError) else RegistryError
    return kind(str(data.get("what")), str(data.get("remedy", "")), **data.get("details", {}))
