"""What a load did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from engine_loader.publishing.publish import Publication
from engine_loader.transfer.pipe import Share


@dataclass(frozen=True)
class LoadReport:
    """`seconds` is all of it, `transfer_s` the reads with their checks, `digest_s` what digests
    took besides.

    `content` is what the tensors hold now, as 32 hexadecimal digits: loads with equal contents have
    brought the same.

    `nbytes` are those of the tensors; `read_nbytes` have been read for them, and may be more where
    that was quicker. `shares` has, for each source of this content, the bytes that came from it,
    and why it was dropped, if it was. `publication` is the loaded rank as a source, if it was to be
    published: it is the caller's to close.
    """

    instance: str
    rank: int | None
    version: int
    content: str
    protocol: str
    tensors: int
    nbytes: int
    read_nbytes: int
    reads: int
    retries: int
    seconds: float
    transfer_s: float
    digest_s: float
    shares: tuple[Share, ...]
    publication: Publication | None = field(default=None, compare=False, repr=False)

    @property
    def gb_per_s(self) -> float:
        """Bytes of the tensors in 10^9 for each second of the whole load."""
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, object]:
        """For a log line."""
        names = (
            "instance",
            "rank",
            "version",
            "content",
            "protocol",
            "tensors",
            "nbytes",
            "retries",
        )
        sources = [share.name for share in self.shares if share.nbytes]
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 6),
            "sources": sources,
        }


def summed(shares: Sequence[Share]) -> tuple[Share, ...]:
    """One for each source, with what it brought in all and why it was dropped in the end."""
    by_name: dict[str, Share] = {}
    for share in shares:
        before = by_name.get(share.name, share)
        by_name[share.name] = (
            share if before is share else replace(share, nbytes=before.nbytes + share.nbytes)
        )
    return tuple(by_name.values())
