"""What the tensors of a load hold already of the content that is loaded. Used by attempts.

Nothing depends on it: where tables of digests cannot be read, all bytes are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice

from engine_loader.errors import Cancelled, SourceLost, TornRead
from engine_loader.loading.job import Job
from engine_loader.loading.report import with_what_came
from engine_loader.planning.reads import Span
from engine_loader.sources.deltas import Deltas
from engine_loader.sources.held import find_held
from engine_loader.sources.manifests import find_manifests
from engine_loader.sources.selection import Choice
from engine_loader.sources.source import SourceRank
from engine_loader.sources.tables import Tables, has_digests
from engine_loader.transfer.progress import OnProgress, Progress
from engine_loader.transfer.received import Received
from engine_loader.transfer.scheduler import OnChecked, Transfer
from engine_registry import Manifest
from engine_registry.errors import RegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_ASKED = 4  # complete ranks whose manifests are looked at


@dataclass(frozen=True)
class Reuse:
    """Of one attempt of the load, which reads from these sources of the choice."""

    job: Job
    choice: Choice
    sources: Sequence[SourceRank]
    received: Received

    def hold(self, plan: Sequence[Span], on_progress: OnProgress, undo: ExitStack) -> None:
        """What the tensors hold of what the plan brings counts as if it had come. Deltas bring
        them nearer to it before, where the load says what they hold.

        Raises Cancelled.
        """
        try:
            self._hold(plan, on_progress, undo)
        except (SourceLost, TornRead, RegistryError) as exc:
            # whatever that is for the load, its reads will show
            log.info(
                "what is there already is not known: %s",
                exc,
                extra=fields("not_compared", error=exc),
            )
        except Cancelled as exc:
            raise with_what_came(exc, self.sources, self.received) from exc

    def _hold(self, plan: Sequence[Span], on_progress: OnProgress, undo: ExitStack) -> None:
        job, received = self.job, self.received
        sources = [*self.sources, *complete_one(job, self.choice, self.sources, undo)]
        tables = Tables(sources, job.device)
        if not tables.spans:
            log.info(
                "none of the sources has digests, so all is read",
                extra=fields("nothing_to_compare", sources=[one.record.key for one in sources]),
            )
            return
        missing = received.arrivals.missing(plan)
        none = Progress(0, sum(span.read_nbytes for span in missing))

        def bring(spans: Sequence[Span], on_checked: OnChecked) -> None:
            """Into memory of ours, beside the tensors."""
            transfer = Transfer(
                job.engine,
                spans,
                [source.for_transfer() for source in sources],
                job.pace,
                lambda progress: on_progress(replace(none, silent=progress.silent)),
                job.cancel,
                on_checked=on_checked,
            )
            transfer.run()
            received.shares += transfer.shares

        tables.lend(job.engine, undo)
        tensors = job.destination.parts
        # What has come is not compared again, and a chain of deltas may break off half-way.
        base = job.base if not received.arrivals.nbytes else ()
        deltas = Deltas(job.engine, sources, base, job.device)
        deltas.look(received.dst, bring, undo)
        bring([*deltas.spans, *tables.spans], tables.receive)
        deltas.apply(received.dst, tensors)
        received.delta_nbytes += deltas.nbytes
        for spans, numbers in find_held(tables, missing, received.dst, tensors, job.cancel):
            received.hold([sources[number].record for number in numbers], spans)
        received.compared = True
        if not received.arrivals.missing(plan):  # so digests prove what they have brought
            received.deltas = deltas.applied()


def complete_one(
    job: Job, choice: Choice, sources: Sequence[SourceRank], undo: ExitStack
) -> list[SourceRank]:
    """Where none of the sources has digests, as those that load: a complete rank of the same
    number and content that has. Only its table and its deltas are read.
    """
    holders = choice.holders
    if holders is None or any(map(has_digests, sources)):
        return []
    alike = (one for one in holders.ready if one.content == choice.content)
    records = list(islice(alike, _ASKED))
    for record, manifest in zip(records, find_manifests(job.registry, records), strict=True):
        if isinstance(manifest, Manifest):
            one = SourceRank(job.registry, job.engine, record, manifest, True, job.device)
            if has_digests(one):
                one.lend(undo)
                return [one]
    return []
