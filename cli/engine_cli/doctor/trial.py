"""The part of `engines doctor` that needs torch and the transfer engine: in a separate process,
as native code may crash or hang.

Started by `doctor.child`. Reads lines of JSON from its standard input: where and how to try the
engine, and which ranks to read from. Writes what it sees as lines of JSON: facts, no judgements.
Ends with its input, so it does not outlive its parent. A thread for each rank.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from engine_cli.doctor.finding import failure
from engine_cli.doctor.peer_reads import read_ranks, read_weights

_LOOPBACK_NBYTES = 64 << 20
_OP_NBYTES = 16 << 20
_write_lock = threading.Lock()


def main() -> NoReturn:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    if "--debug" not in sys.argv:  # what native code prints
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # nothing may come between our lines

    def report(fact: str, **fields: Any) -> None:
        with _write_lock:
            out.write(json.dumps({"fact": fact, **fields}) + "\n")

    # In whichever order they come: different checks send them.
    engines: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    ranks: queue.SimpleQueue[list[dict[str, Any]]] = queue.SimpleQueue()
    speeds: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if "engine" in order:
                engines.put(order["engine"])
            elif "ranks" in order:
                ranks.put(order["ranks"])
            else:
                speeds.put(order["speed"])
        os._exit(0)  # the process that asked is gone

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    _look(engines.get, ranks.get, speeds.get, report)
    listener.join()
    os._exit(0)


def _look(
    task: Callable[[], dict[str, str]],
    ranks: Callable[[], list[dict[str, Any]]],
    speeds: Callable[[], dict[str, Any]],
    report: Callable[..., None],
) -> None:
    """`task` waits for where and how to try the engine, `ranks` for the next to read from, `speeds`
    for the one whose speed is to be measured.
    """
    try:
        import torch

        report("torch", error="", **_torch_facts(torch))
    except Exception as exc:  # noqa: BLE001  described
        report(
            "torch",
            **failure(exc),
            missing=isinstance(exc, ModuleNotFoundError) and exc.name == "torch",
        )
        return
    wanted = task()
    host, protocol, device = wanted["host"], wanted["protocol"], wanted["device"]
    try:
        report("library", error="", **_library_facts(host, protocol))
    except Exception as exc:  # noqa: BLE001  described
        report("library", **failure(exc))
        return
    try:
        from engine_loader import open_engine

        engine = open_engine(host, protocol, device)
    except Exception as exc:  # noqa: BLE001  described
        report("engine", **failure(exc))
        return
    report("engine", error="")
    threading.Thread(target=read_ranks, args=(engine, ranks, report), daemon=True).start()
    threading.Thread(target=read_weights, args=(engine, speeds, report), daemon=True).start()
    report("loopback", **_loopback(engine, host, protocol, device))
    if protocol == "socket":
        report("neighbour", **_neighbour(engine, host))


def _library_facts(host: str, protocol: str) -> dict[str, Any]:
    if protocol == "socket":
        return {}
    return _kernel_facts() if protocol == "cuda_ipc" else _mooncake_facts(host)


def _mooncake_facts(host: str) -> dict[str, Any]:
    from engine_loader.engines.mooncake.binding import built_transports
    from engine_loader.engines.mooncake.start import load_library
    from engine_registry.schema.address import family_of

    load_library(family_of(host.strip("[]")))
    return {"transports": built_transports()}


def _kernel_facts() -> dict[str, Any]:
    """Of the kernels that cuda_ipc copies with. Triton is imported only where it would have to
    compile them.
    """
    from engine_loader.engines.cuda_ipc.launcher import KERNELS
    from engine_loader.kernels import kept
    from engine_loader.warming import archs_here

    archs = archs_here()
    all_kept = all(kernel.is_kept(arch) for arch in archs for kernel in KERNELS.values())
    facts = {"archs": archs, "folder": str(kept.folder())}
    if archs and all_kept:
        return facts
    triton = importlib.import_module("triton")
    return {**facts, "triton": triton.__version__, "can_be_kept": kept.can_be_written()}


def _torch_facts(torch: Any) -> dict[str, Any]:
    built = torch.version.cuda or torch.version.hip or ""
    count = torch.cuda.device_count() if built else 0
    return {
        "version": torch.__version__,
        "built_for": built,
        "devices": [torch.cuda.get_device_name(number) for number in range(count)],
        "no_access": [
            (a, b)
            for a in range(count)
            for b in range(count)
            if a != b and not torch.cuda.can_device_access_peer(a, b)
        ],
    }


def _loopback(engine: Any, host: str, protocol: str, device: str) -> dict[str, Any]:
    """Reads memory of one engine with another, as peers do, and compares it.

    Over cuda_ipc that is memory of this process's GPU, which the kernel reads; over socket it goes
    through a connection.
    """
    from engine_loader import SocketEngine, open_engine

    if protocol == "nvlink_intra":
        return {
            "error": "",
            "skipped": "memory of one's own process cannot be read over nvlink_intra",
        }
    try:
        with (
            SocketEngine(host, same_host=False)
            if protocol == "socket"
            else open_engine(host, protocol, device)
        ) as source:
            return _measured(engine, source)
    except Exception as exc:  # noqa: BLE001  described
        return failure(exc)


def _measured(engine: Any, source: Any) -> dict[str, Any]:
    import torch

    from engine_registry import Region

    on_gpu = engine.protocol == "cuda_ipc"
    kind = "cuda" if on_gpu else "cpu"
    src = torch.randint(0, 256, (_LOOPBACK_NBYTES,), dtype=torch.uint8, device=kind)
    dst = torch.zeros_like(src)
    source.register(Region(src.data_ptr(), src.nbytes))
    engine.lend(lent := Region(dst.data_ptr(), dst.nbytes))
    engine.connect(source.session_id)
    if on_gpu:
        _read_all(engine, source.session_id, src, dst)  # compiles the kernel
        dst.zero_()
        torch.cuda.synchronize()
    began = time.monotonic()
    _read_all(engine, source.session_id, src, dst)
    seconds = time.monotonic() - began
    engine.take_back(lent)
    return {
        "error": "",
        "nbytes": src.nbytes,
        "seconds": seconds,
        "equal": bool(torch.equal(src, dst)),
    }


_SHOWN = ctypes.create_string_buffer(os.urandom(32), 32)  # to the process that asks


def _neighbour(engine: Any, host: str) -> dict[str, Any]:
    """As another process of this user finds memory of this one, and how fast it is read."""
    from engine_loader import SocketEngine

    try:
        with SocketEngine(host) as source:
            found = _measured(engine, source)
            if not engine.reads_within_host(source.session_id):
                return {"error": "turned off, or the kernel lacks process_vm_readv"}
    except Exception as exc:  # noqa: BLE001  described
        return failure(exc)
    shown = {"pid": os.getpid(), "addr": ctypes.addressof(_SHOWN), "content": _SHOWN.raw.hex()}
    return {**found, **shown}


def _read_all(engine: Any, peer: str, src: Any, dst: Any) -> None:
    from engine_loader.planning.plan import ReadOp

    reads = [
        engine.start(peer, ReadOp("loopback", src.data_ptr() + at, dst.data_ptr() + at, _OP_NBYTES))
        for at in range(0, _LOOPBACK_NBYTES, _OP_NBYTES)
    ]
    for read in reads:
        while not engine.done(read):
            time.sleep(1e-4)
