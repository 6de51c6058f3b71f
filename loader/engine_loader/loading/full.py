"""All tensors of an instance, whole, put together from the shards of its ranks: one output file's
worth of memory at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine_loader.engines.base import Engine
from engine_loader.files.whole_files import WholeFiles
from engine_loader.loading.report import LoadReport
from engine_loader.loading.together import load_together
from engine_loader.loading.whole_source import Reader
from engine_loader.options import LoadOptions, refuse
from engine_loader.planning.content import content_of_parts
from engine_loader.planning.whole import MAX_FILE_NBYTES, into_files
from engine_loader.transfer.shares import summed
from engine_registry import Manifest, Registry
from engine_registry.watching.waiting import Wanted

_REFUSED = {
    "version": "leave it out to load the newest version, or say released",
    "contents": "leave it out: all files are of the contents that are found first",
    "partial": "leave it out: all tensors are loaded",
    "reuse": "leave it out: the tensors are new",
    "base": "leave it out: the tensors are new",
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
        options: How to choose, read and check; see LoadOptions. Without `contents`, `partial`,
            `reuse` and `base`, and with no `version` but `"released"`.

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
    reader = Reader(registry, engine, source, options)
    return _Full(reader, files, max_file_nbytes, timeout_s).fill()


@dataclass
class _Full:
    reader: Reader
    out: WholeFiles | None
    max_file_nbytes: int
    timeout_s: float
    write_s: float = 0.0

    def fill(self) -> LoadReport:
        start = time.monotonic()
        reports, tries = load_together(
            self._once, self.timeout_s, "one file and the next", self.reader.options.version
        )
        together = _together(reports)
        seconds = time.monotonic() - start - self.write_s
        return replace(together, retries=together.retries + tries, seconds=seconds)

    def _once(self, wait_s: float) -> list[LoadReport]:
        source = self.reader.find(wait_s)
        files = into_files(source.wholes, self.max_file_nbytes)
        if self.out is not None:
            self.out.begin(files)
        reports: list[LoadReport] = []
        for tensors, report in source.fill(files, wait_s):
            reports.append(report)
            write_start = time.monotonic()
            if self.out is not None:
                self.out.write(tensors)
            self.write_s += time.monotonic() - write_start
        return reports


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
        register_s=sum(report.register_s for report in reports),
        shares=summed([share for report in reports for share in report.shares]),
        lent=dict(sum([Counter(report.lent) for report in reports], Counter())),
    )


def _content_of(reports: Sequence[LoadReport]) -> str:
    """Of all files together."""
    return (
        reports[0].content
        if len(reports) == 1
        else content_of_parts([report.content for report in reports], Manifest((), ()))
    )
