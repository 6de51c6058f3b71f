"""What `load_or_seed` returns."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from engine_loader.loading.report import LoadReport
from engine_loader.publishing.publication import Publication
from engine_registry.errors import EtcdError


@dataclass(frozen=True)
class Seeded:
    """Where the weights of a rank came from. A context manager that closes the publication.

    Attributes:
        source: `"peers"`, or `"disk"` for the fallback.
        publication: The rank as a source. None only where etcd could not be reached, or refused.
        report: What the load from peers did. None where the fallback was read.
        reason: Why it was read although there were peers, or without a turn. Else empty.
        seconds: How many seconds the start took.
        unpublished: Why there is no publication. Else None.
    """

    source: Literal["peers", "disk"]
    publication: Publication | None
    report: LoadReport | None
    reason: str
    seconds: float
    unpublished: EtcdError | None = None

    def close(self) -> None:
        """Withdraws the rank. It may be called any number of times."""
        if self.publication is not None:
            self.publication.close()

    def __enter__(self) -> Seeded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
