"""Mooncake's store: the source puts each tensor into its segment, the reader gets all of them by
name. The service is the store's master, with its metadata server.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mooncake.store import MooncakeDistributedStore

from benchmarks.peers.sets import Tensors, storages
from benchmarks.peers.work import Facts, Load, LoadFailed, Work, free_port

_BUFFER_NBYTES = 64 << 20
_UNIT_NBYTES = 16 << 20
_WITHIN_S = 20.0
_MOST = 512  # tensors in a call: of 20,000 their transfer fails


@contextmanager
def service(work: Work) -> Iterator[Facts]:
    master, metadata, metrics = (free_port(work.host) for _ in range(3))
    program = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    if program is None:
        raise FileNotFoundError("mooncake_master is not installed beside this Python")
    command = [
        program,
        f"--rpc_address={work.host}",
        f"--rpc_port={master}",
        f"--metrics_port={metrics}",
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_host={work.host}",
        f"--http_metadata_server_port={metadata}",
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            _answers(work.host, master)
            _answers(work.host, metadata)
            yield {
                "master": f"{work.host}:{master}",
                "metadata": f"http://{work.host}:{metadata}/metadata",
            }
        finally:
            process.kill()


def _answers(host: str, port: int) -> None:
    end = time.monotonic() + _WITHIN_S
    while True:
        try:
            socket.create_connection((host, port)).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return


@contextmanager
def source(work: Work, tensors: Tensors) -> Iterator[Facts]:
    """Its segment has place for a copy of the tensors, and for what the store adds."""
    segment = -(-int(1.3 * sum(work.sizes) + _BUFFER_NBYTES) // _UNIT_NBYTES) * _UNIT_NBYTES
    store = _store(work, segment)
    codes = store.batch_put_from(*_memory(store, tensors))
    _check("batch_put_from", next((code for code in codes if code != 0), 0))
    yield {}
    store.close()


@contextmanager
def reader(work: Work, tensors: Tensors) -> Iterator[Load]:
    store = _store(work, 0)
    names, addresses, sizes = _memory(store, tensors)

    def run() -> None:
        for start in range(0, len(names), _MOST):
            some = slice(start, start + _MOST)
            found = store.batch_get_into(names[some], addresses[some], sizes[some])
            for code, size in zip(found, sizes[some], strict=True):
                if code != size:
                    raise LoadFailed(f"batch_get_into returned {code} for a tensor")

    yield Load(run)
    store.close()


def _memory(store: Any, tensors: Tensors) -> tuple[list[str], list[int], list[int]]:
    """Names, addresses and bytes of the tensors, whose memory the store may use from now on."""
    for address, nbytes in storages(tensors):
        _check("register_buffer", store.register_buffer(address, nbytes))
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    return list(tensors), addresses, [tensor.nbytes for tensor in tensors.values()]


def _store(work: Work, segment_nbytes: int) -> Any:
    store = MooncakeDistributedStore()
    facts = work.facts
    code = store.setup(
        work.host, facts["metadata"], segment_nbytes, _BUFFER_NBYTES, "tcp", "", facts["master"]
    )
    _check("setup", code)
    return store


def _check(what: str, code: int) -> None:
    if code != 0:
        raise LoadFailed(f"{what} returned {code}")
