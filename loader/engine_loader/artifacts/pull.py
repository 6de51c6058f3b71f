"""`pull_artifact`: the files of a folder that a peer with the same key offers.

A timer's thread ends a pull that takes too long.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine_loader.artifacts.archive import MAX_NBYTES
from engine_loader.artifacts.key import TENSOR, ArtifactName
from engine_loader.artifacts.unpacking import Unpacked, unpack
from engine_loader.engines.base import Engine
from engine_loader.errors import ArtifactInvalid, Cancelled
from engine_loader.loading.report import LoadReport
from engine_loader.loading.whole_source import Reader, WholeSource
from engine_loader.options import LoadOptions, refuse
from engine_registry import Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.schema.numbers import seconds
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_REFUSED = {
    "verify": "leave it out: digests are always compared",
    "reuse": "leave it out: the memory is new",
    "base": "leave it out: the memory is new",
    "also_from": "leave it out: what is offered for the key is pulled",
    "partial": "leave it out: all of the artifact is pulled",
    "version": "leave it out: what is offered for the key is pulled",
    "contents": "leave it out: what is offered for the key is pulled",
    "cancel": "say `timeout_s`",
}


@dataclass(frozen=True)
class ArtifactReport:
    """What a pull did.

    Attributes:
        name: The name of the artifact.
        digest: The digest of its key.
        content: The content of the archive, as 32 hexadecimal digits. Equal ones have the same
            files.
        sources: The ranks that the bytes came from: their keys in etcd.
        nbytes: Bytes of the archive.
        seconds: Seconds of the whole pull.
        load_s: Seconds of the load from memory to memory, within `seconds`.
        new: How many files were put into the folder.
        unchanged: How many files were there already, with the same bytes.
        kept: How many files were there with other bytes, or as something else. They have stayed
            as they were.
    """

    name: str
    digest: str
    content: str
    sources: tuple[str, ...]
    nbytes: int
    seconds: float
    load_s: float
    new: int
    unchanged: int
    kept: int

    @property
    def files(self) -> int:
        """How many files the archive has."""
        return self.new + self.unchanged + self.kept

    def facts(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "artifact": self.name,
            "digest": self.digest,
            "content": self.content,
            "sources": list(self.sources),
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 6),
            "load_s": round(self.load_s, 6),
            "files": self.files,
            "new": self.new,
            "unchanged": self.unchanged,
            "kept": self.kept,
        }


def pull_artifact(
    registry: Registry,
    engine: Engine,
    name: str,
    folder: str | os.PathLike[str],
    key: Mapping[str, str],
    *,
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> ArtifactReport | None:
    """Copies the files that a peer offers under this name and exactly this key into a folder.

    It does not wait for a peer: where none is ready now, there is nothing to pull. Digests prove
    all bytes before a file is written. Others may read and write in the folder meanwhile: they see
    whole files only. Files that are there already stay as they are.

    If the call raises, no file of the artifact is in the folder, but for those that were moved
    before the system has refused a move. A killed call leaves a hidden folder, which the next one
    deletes.

    Args:
        registry: Finds the peers.
        engine: Reads their memory.
        name: The name of the artifact.
        folder: Where the files go. It is made if it is not there.
        key: The key, as it was published.
        timeout_s: How many seconds the call may take. What it waits for then may come first, such
            as one answer of etcd or the end of one file.
        options: How to read; see LoadOptions. Without `verify`, `partial`, `version`, `contents`,
            `reuse`, `base`, `also_from` and `cancel`.

    Returns:
        What the pull did; None where no peer offers it.

    Raises:
        ArtifactInvalid: The archive is damaged, or the folder cannot take its files.
        Cancelled: `timeout_s` is over.
        SourceLost: All peers went away.
        DigestMismatch: The bytes are not those that were published.
        InvalidField: An argument is not valid; `details["field"]` names it.
        LoaderError: What else `load` raises.
        EtcdError: Etcd cannot be reached, or refuses.
    """
    refuse(options, "pull_artifact", _REFUSED)
    artifact, began = ArtifactName(name, key), time.monotonic()
    with _cancelled_after(artifact, seconds("timeout_s", timeout_s)) as cancel:
        reader = Reader(
            registry,
            engine,
            artifact.model,
            replace(options, verify="digest", cancel=cancel),
            names=(TENSOR,),
        )
        try:
            source = reader.find(0.0)
        except (InstanceNotFound, InstanceIncomplete):
            log.info(
                "no peer offers the artifact %s",
                artifact,
                extra=fields("artifact_not_found", artifact=name, digest=artifact.digest),
            )
            return None
        archive, report = _load(source, began + timeout_s)

        def check() -> None:
            if cancel.is_set():
                raise Cancelled("the pull was cancelled")

        found = unpack(archive.numpy().data, Path(folder), check)
    pulled = _report_of(artifact, report, found, time.monotonic() - began)
    log.info(
        "pulled the artifact %s: %d of %d files are new",
        artifact,
        pulled.new,
        pulled.files,
        extra=fields("artifact_pulled", **pulled.facts()),
    )
    return pulled


@contextmanager
def _cancelled_after(artifact: ArtifactName, timeout_s: float) -> Iterator[threading.Event]:
    """An event that is set when the time is over. What ends for that reason says so."""
    cancel = threading.Event()
    timer = threading.Timer(timeout_s, cancel.set)
    timer.daemon = True
    timer.start()
    try:
        yield cancel
    except Cancelled as exc:
        raise Cancelled(
            f"the artifact {artifact} was not there in time, and is left out",
            "raise `timeout_s`, or do without it",
        ) from exc
    finally:
        timer.cancel()


def _load(source: WholeSource, deadline: float) -> tuple[torch.Tensor, LoadReport]:
    """ArtifactInvalid, before a byte moves, where what is offered is no archive."""
    (whole,) = source.wholes
    if whole.dtype != "uint8" or len(whole.shape) != 1 or not 0 < whole.nbytes <= MAX_NBYTES:
        raise ArtifactInvalid(
            f"{source.records[0].key} offers no archive, but {list(whole.shape)} of {whole.dtype}; "
            f"an archive has {MAX_NBYTES} bytes at most",
            "evict it with `Registry.evict`",
            key=source.records[0].key,
        )
    with closing(source.fill([[whole]], max(0.0, deadline - time.monotonic()))) as loads:
        tensors, report = next(loads)
    return tensors[TENSOR], replace(report, content=source.contents[0])  # that of the publication


def _report_of(
    artifact: ArtifactName, report: LoadReport, found: Unpacked, took_s: float
) -> ArtifactReport:
    return ArtifactReport(
        name=artifact.name,
        digest=artifact.digest,
        content=report.content,
        sources=tuple(share.name for share in report.shares if share.nbytes),
        nbytes=report.nbytes,
        seconds=took_s,
        load_s=report.seconds,
        new=found.new,
        unchanged=found.unchanged,
        kept=found.kept,
    )
