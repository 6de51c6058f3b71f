"""`fetch`: the weights of a running instance in safetensors files, in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from engine_loader.engines.base import ClosableEngine
from engine_loader.engines.opening import open_engine
from engine_loader.engines.protocols import protocol_for
from engine_loader.files.whole_files import WholeFiles
from engine_loader.loading.chosen_rank import rank_file, ranks_of
from engine_loader.loading.full import load_full
from engine_loader.loading.progress_bar import progress_bar
from engine_loader.loading.rank_file import copy_rank
from engine_loader.options import LoadOptions, refuse
from engine_loader.planning.whole import MAX_FILE_NBYTES
from engine_registry import RankRecord, Registry
from engine_registry.watching.waiting import Wanted

_REFUSED = {"partial": "leave it out: all tensors are fetched"}
_REFUSED_WHOLE = {
    "reuse": "leave it out, or say `rank`: the file of a rank can be reused",
    "base": "leave it out, or say `rank`: the file of a rank can be reused",
}


def fetch(
    source: Wanted,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    registry: Registry | str | Sequence[str] = "127.0.0.1:2379",
    host: str | None = None,
    protocol: str | None = None,
    device: str = "",
    location: str = "",
    force: bool = False,
    max_file_nbytes: int = MAX_FILE_NBYTES,
    show_progress: bool = True,
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> list[Path]:
    """Copies the weights of a running instance into files, in one call.

    Connects to etcd, starts a transfer engine, loads, and closes both. A bar on stderr shows how
    far it is, if that is a terminal. The files are complete, or none of them is there.

    Args:
        source: As for `load`.
        out: The folder of the files; it is made if it is not there.
        rank: The rank whose weights are copied as they are there, to `rank-R.safetensors`. None
            copies the weights of all ranks, put together to whole tensors, to `model.safetensors`,
            or to several files with an index.
        registry: Finds the sources: a Registry, or the endpoints of etcd as `Registry.connect`
            takes them.
        host: The address of this machine. None finds the one on the way to etcd.
        protocol: How to read, as for open_engine. None takes the quickest that the source is
            served over and this machine has.
        device: Which RDMA devices to use, as for open_engine.
        location: Where this machine stands, as for open_engine.
        force: Whether files that are there may be replaced.
        max_file_nbytes: Without `rank`: bytes of tensors in one file, at most, and so the memory
            that the call takes.
        show_progress: Whether to show the bar.
        timeout_s: How many seconds to wait until a source is ready.
        options: How to choose, read and check; see LoadOptions. Without `partial`. With `rank`
            None also without `version`, `contents`, `reuse` and `base`. With `rank`, `reuse` does
            not read what the file there already holds, which `force` allows to be replaced.

    Returns:
        The paths of the files. The index is the last one, where there is one.

    Raises:
        InvalidField: A file is there already, there is no such rank, or an argument is not valid.
        WeightsFileInvalid: A file cannot be written. No byte has moved, where that is known before.
        EngineUnavailable: The transfer engine cannot be started here.
        SourceUnreachable: No source is served over a protocol that this machine has.
        LoaderError: What `load` and `load_full` raise.
        RegistryError: What `Registry.connect` and `Registry.resolve` raise.

    Example:
        `fetch("qwen-a", "weights", rank=0, registry="etcd-0:2379,etcd-1:2379")`
    """
    refuse(options, "fetch", _REFUSED if rank is not None else {**_REFUSED, **_REFUSED_WHOLE})
    folder = Path(out)
    path = rank_file(folder, rank, force) if rank is not None else None
    files = WholeFiles(folder, force=force) if rank is None else None
    with ExitStack() as stack:
        if not isinstance(registry, Registry):
            registry = stack.enter_context(Registry.connect(registry))
        if rank is None:
            records = registry.ready(source, timeout_s)[0].records
            name, readable = records[0].instance, records
        else:
            records = ranks_of(registry, source, rank, timeout_s)
            name, readable = f"{records[0].instance}/{rank}", (records[rank],)
        engine = stack.enter_context(_engine(registry, readable, host, protocol, device, location))
        if files is not None:
            stack.enter_context(files)
        options = replace(
            options,
            progress=stack.enter_context(progress_bar(name, options.progress, show_progress)),
        )
        if rank is not None and path is not None:
            copy_rank(
                registry, engine, source, records, rank, path, timeout_s=timeout_s, options=options
            )
            return [path]
        load_full(
            registry,
            engine,
            source,
            files=files,
            max_file_nbytes=max_file_nbytes,
            timeout_s=timeout_s,
            options=options,
        )
    return files.paths if files is not None else []


def _engine(
    registry: Registry,
    records: Sequence[RankRecord],
    host: str | None,
    protocol: str | None,
    device: str,
    location: str,
) -> ClosableEngine:
    return open_engine(
        host or registry.local_address(),
        protocol_for(records) if protocol is None else protocol,
        device,
        location=location,
    )
