"""All tensors of an instance, whole, put together from the shards of its ranks: one output file's
worth of memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.files.memory import allocate, block_of, extent, with_strides
from engine_loader.files.whole_files import WholeFiles
from engine_loader.loading.load import load
from engine_loader.loading.report import LoadReport
from engine_loader.loading.together import load_together
from engine_loader.options import LoadOptions, refuse
from engine_loader.planning.content import content_of_parts
from engine_loader.planning.whole import MAX_FILE_NBYTES, Whole, into_files, whole_tensors
from engine_loader.sources.manifests import fetch_manifests
from engine_loader.sources.search import Search
from engine_loader.tensors.dtypes import dtype_named
from engine_loader.tensors.shards import Shard
from engine_loader.transfer.progress import OnProgress, Progress
from engine_loader.transfer.shares import summed
from engine_registry import Manifest, RankRecord, Registry
from engine_registry.watching.waiting import Wanted

_REFUSED = {
    "version": "leave it out: the newest version is loaded",
    "contents": "leave it out: all files are of the contents that are found first",
    "partial": "leave it out: all tensors are loaded",
}


def load_full(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    files: WholeFiles | None = None,
    max_file_nbytes: int = MAX_FILE_NBYTES,
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> LoadReport:
    """Reads all tensors of an instance, whole, and writes them to files.

    All tensors are of one content. If the source is updated or started again in between, all are
    loaded again. The call takes the memory of one file.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: As for `load`.
        files: Where to write. None only reads the tensors.
        max_file_nbytes: Bytes of tensors in one file, at most. A larger tensor has a file for
            itself.
        timeout_s: How many seconds to wait until a source is ready.
        options: How to choose, read and check; see LoadOptions. Without `version`, `contents` and
            `partial`.

    Returns:
        What the loads of all files did together. Its `seconds` are without the writing.

    Raises:
        WeightsMismatch: Ranks do not say which part of the whole their tensors are, or do not have
            all of it. No byte has moved.
        WeightsFileInvalid: A file cannot be written.
        LoaderError: What `load` raises.
        RegistryError: What `load` raises.
    """
    refuse(options, "load_full", _REFUSED)
    full = _Full(registry, engine, source, files, max_file_nbytes, timeout_s, options)
    return full.fill()


@dataclass
class _Full:
    registry: Registry
    engine: Engine
    wanted: Wanted
    out: WholeFiles | None
    max_file_nbytes: int
    timeout_s: float
    options: LoadOptions
    write_s: float = 0.0

    def fill(self) -> LoadReport:
        start = time.monotonic()
        reports, tries = load_together(self._once, self.timeout_s, "one file and the next")
        together = _together(reports)
        seconds = time.monotonic() - start - self.write_s
        return replace(together, retries=together.retries + tries, seconds=seconds)

    def _once(self, wait_s: float) -> list[LoadReport]:
        contents, wholes = self._wholes(wait_s)
        files = into_files(wholes, self.max_file_nbytes)
        layouts = [
            {whole.name: (dtype_named(whole.dtype), whole.shape) for whole in file}
            for file in files
        ]
        memory = block_of(max(map(extent, layouts)))
        if self.out is not None:
            self.out.begin(files)
        total_nbytes = sum(whole.nbytes for file in files for whole in file)
        reports: list[LoadReport] = []
        done_nbytes = 0
        for file, layout in zip(files, layouts, strict=True):
            tensors = with_strides(
                allocate(layout, memory=memory), {whole.name: whole.strides for whole in file}
            )
            on_progress = self._part_of_progress(
                done_nbytes, sum(whole.nbytes for whole in file), total_nbytes
            )
            reports.append(self._load(file, tensors, contents, wait_s, on_progress))
            done_nbytes += sum(whole.nbytes for whole in file)
            write_start = time.monotonic()
            if self.out is not None:
                self.out.write(tensors)
            self.write_s += time.monotonic() - write_start
        return reports

    def _wholes(self, wait_s: float) -> tuple[tuple[str, ...], list[Whole]]:
        """Of the best instance that has whole tensors, with the contents of its ranks."""
        deadline = time.monotonic() + wait_s
        found = Search(
            self.registry,
            self.engine,
            self.wanted,
            None,
            Manifest((), ()),
            boxes=True,
            cancel=self.options.cancel,
        ).find(deadline)
        misfits: list[LoaderError] = []
        for records in [team for group in found.instances for team in group.teams]:
            try:
                return tuple(record.content for record in records), self._wholes_of(records)
            except LoaderError as exc:
                misfits.append(exc)
        raise misfits[0]

    def _wholes_of(self, records: Sequence[RankRecord]) -> list[Whole]:
        return whole_tensors(records[0].instance, fetch_manifests(self.registry, records))

    def _load(
        self,
        file: Sequence[Whole],
        tensors: dict[str, torch.Tensor],
        contents: Sequence[str],
        wait_s: float,
        progress: OnProgress | None,
    ) -> LoadReport:
        return load(
            self.registry,
            self.engine,
            self.wanted,
            rank=0 if any(whole.opaque for whole in file) else None,  # there is no other
            tensors=tensors,
            shards={
                whole.name: Shard(whole.shape, (0,) * len(whole.shape))
                for whole in file
                if not whole.opaque
            },
            timeout_s=wait_s,
            options=replace(self.options, contents=contents, partial=True, progress=progress),
        )

    def _part_of_progress(
        self, done_nbytes: int, nbytes: int, total_nbytes: int
    ) -> OnProgress | None:
        """A load counts what it reads, which may be more than the tensors have."""
        on_progress = self.options.progress
        if on_progress is None:
            return None
        return lambda part: on_progress(
            Progress(done_nbytes + nbytes * part.nbytes // max(1, part.total_nbytes), total_nbytes)
        )


def _together(reports: Sequence[LoadReport]) -> LoadReport:
    return replace(
        reports[0],
        rank=None,
        content=_content_of(reports),
        tensors=sum(report.tensors for report in reports),
        nbytes=sum(report.nbytes for report in reports),
        read_nbytes=sum(report.read_nbytes for report in reports),
        reads=sum(report.reads for report in reports),
        retries=sum(report.retries for report in reports),
        transfer_s=sum(report.transfer_s for report in reports),
        digest_s=sum(report.digest_s for report in reports),
        shares=summed([share for report in reports for share in report.shares]),
    )


def _content_of(reports: Sequence[LoadReport]) -> str:
    """Of all files together."""
    return (
        reports[0].content
        if len(reports) == 1
        else content_of_parts([report.content for report in reports], Manifest((), ()))
    )
