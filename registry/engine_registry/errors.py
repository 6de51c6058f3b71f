"""Every error that `registry` raises on purpose; callers catch these and nothing else.

RegistryError
├── EtcdError               etcd did not do what was asked
│   ├── EtcdUnavailable     no endpoint answered in time, or what answers is not etcd
│   ├── EtcdRefused         etcd answered no: credentials, permission, size
│   │   ├── EtcdFull        it has no space left (NOSPACE): reads, deletions and renewals pass, writes do not
│   │   └── AnswerTooLarge  what it answers is more than one message may hold: ask for less at once
│   ├── LeaseNotFound       the lease has expired or was revoked
│   └── HistoryLost         the watch cannot go on from where it was: compacted, or another store
├── InvalidField            a name or number outside its range (also a ValueError)
├── RecordDamaged           what is stored under a key cannot be read
│   └── SchemaUnsupported   it was written by a newer version
├── RankConflict            another process holds this rank
├── InstanceMismatch        the rank disagrees with its siblings
├── InstanceNotFound        no rank of the instance is registered
├── InstanceIncomplete      some ranks are missing or not consistent
├── RegistrationLost        the registration has ended and will not come back
│   ├── Evicted             somebody deleted it on purpose
│   └── Superseded          a newer registration has taken its place
├── KeeperFailed            the process that holds the lease cannot be started
├── GatewayFailed           the HTTP gateway cannot be started
├── MetricsUnavailable      metrics were asked for, and prometheus_client is not installed
└── LocalEtcdFailed         the embedded etcd cannot be started
"""

from __future__ import annotations

from typing import Any


class RegistryError(Exception):
    """What happened, to which key, and what to do; `details` holds the same as JSON-able values."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def to_wire(self) -> dict[str, Any]:
        return {"type": type(self).__name__, "message": str(self), "details": self.details}


class EtcdError(RegistryError):
    pass


class EtcdUnavailable(EtcdError):
    pass


class EtcdRefused(EtcdError):
    pass


class EtcdFull(EtcdRefused):
    pass


class AnswerTooLarge(EtcdRefused):
    pass


class LeaseNotFound(EtcdError):
    pass


class HistoryLost(EtcdError):
    pass


class InvalidField(RegistryError, ValueError):
    pass


class RecordDamaged(RegistryError):
    pass


class SchemaUnsupported(RecordDamaged):
    pass


class RankConflict(RegistryError):
    pass


class InstanceMismatch(RegistryError):
    pass


class InstanceNotFound(RegistryError):
    pass


class InstanceIncomplete(RegistryError):
    pass


class RegistrationLost(RegistryError):
    pass


class Evicted(RegistrationLost):
    pass


class Superseded(RegistrationLost):
    pass


class KeeperFailed(RegistryError):
    pass


class GatewayFailed(RegistryError):
    pass


class MetricsUnavailable(RegistryError):
    pass


class LocalEtcdFailed(RegistryError):
    pass


def from_wire(data: dict[str, Any]) -> RegistryError:
    """The error that another process of ours sent with `to_wire`."""
    found = globals().get(str(data.get("type")))
    kind = found if isinstance(found, type) and issubclass(found, RegistryError) else RegistryError
    return kind(str(data.get("message")), **data.get("details", {}))
