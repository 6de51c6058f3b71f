"""What a load did."""

from __future__ import annotations

from dataclasses import dataclass, field

from loader.pipe import Share
from loader.publish import Publication


@dataclass(frozen=True)
class LoadReport:
    """`seconds` is all of it, `transfer_s` the reads with their checks, `digest_s` what digests took besides.

    `nbytes` are those of the tensors; `read_nbytes` have been read for them, and may be more where that was quicker. `shares` has,
    for each source of this version, the bytes that came from it, and why it was dropped, if it was. `publication` is the loaded
    rank as a source, if it was to be published: it is the caller's to close.
    """

    instance: str
    rank: int | None
    version: int
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
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0

    def facts(self) -> dict[str, object]:
        """For a log line."""
        names = ("instance", "rank", "version", "protocol", "tensors", "nbytes", "retries")
        sources = [share.name for share in self.shares if share.nbytes]
        return {**{name: getattr(self, name) for name in names}, "seconds": round(self.seconds, 6), "sources": sources}
