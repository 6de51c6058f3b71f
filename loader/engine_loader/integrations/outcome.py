"""`Outcome`: what a start did, as a sentence and as data for a log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine_loader.starting.seeded import Seeded


@dataclass(frozen=True)
class Outcome:
    """Where the weights of a rank came from, and whether peers get them.

    Attributes:
        rank: The instance and the number of the rank.
        seeded: What `load_or_seed` returned. None where something of this library has failed.
        extra_nbytes: Bytes that are only kept for peers.
    """

    rank: str
    seeded: Seeded | None
    extra_nbytes: int = 0

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        seeded = self.seeded
        report = seeded.report if seeded is not None else None
        adopted = seeded.adopted if seeded is not None else None
        nbytes, sources = 0, list[str]()
        if adopted is not None:
            nbytes, sources = adopted.nbytes, [adopted.record.key]
        elif report is not None:
            nbytes, sources = report.nbytes, [one.name for one in report.shares if one.nbytes]
        publication = seeded.publication if seeded is not None else None
        return {
            "rank": self.rank,
            "source": seeded.source if seeded is not None else "disk",
            "nbytes": nbytes,
            "sources": sources,
            "seconds": round(seeded.seconds, 3) if seeded is not None else None,
            "version": publication.version if publication is not None else None,
            "content": publication.content if publication is not None else None,
            "serves": publication is not None,
            "extra_nbytes": self.extra_nbytes,
        }

    def __str__(self) -> str:
        facts = self.facts()
        how = "has read its weights with the engine's loader"
        if facts["source"] == "peers":
            how = (
                f"has copied {facts['nbytes'] / 1e6:.1f} MB of weights from "
                f"{', '.join(facts['sources'])} in {facts['seconds']:.1f} s"
            )
        if facts["source"] == "held":
            how = (
                f"has adopted {facts['nbytes'] / 1e6:.1f} MB of weights that "
                f"{', '.join(facts['sources'])} has left on this host, in {facts['seconds']:.1f} s"
            )
        if not facts["serves"]:
            return f"{self.rank} {how}, and serves no peers"
        extra = self.extra_nbytes / 1e6
        keeps = f", for whom it keeps {extra:.1f} MB more than the engine uses" if extra else ""
        return f"{self.rank} {how}, and serves them to peers{keeps}"
