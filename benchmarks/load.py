"""Start-up, publishing and loading over tcp on this machine, medians of several rounds, baselines
in turns.

*naive* is what SGLang does: one `batch_transfer_sync_read` of all tensors, with no check of
anything, between the same buffers, its addresses known. Ours is the whole `load`: resolve,
manifest, plan, reads, checks; `our_reads_to_naive` compares the reads alone.
*socket* is one stream through a plain socket into the same memory, *safetensors* a file that lies
in the page cache. Sources are separate processes.
"""

from __future__ import annotations

import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

from benchmarks import figures
from benchmarks.figures import another_process, median_s, seconds
from benchmarks.naive import naive_load
from engine_cli.commands.demo import find_checkpoint
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_cli.runtime.children import python
from engine_loader import (
    InProcessEngine,
    LoadOptions,
    LoadReport,
    MooncakeEngine,
    Progress,
    PublishOptions,
    load,
    publish,
)
from engine_loader.digests.table import digests_of
from engine_loader.files.memory import allocate_like
from engine_loader.files.weights import read_weights
from engine_loader.planning.matching import Origin
from engine_loader.planning.plan import plan
from engine_registry import Manifest, ModelIdentity, Region, Registry, TensorEntry
from engine_registry.etcd.local import LocalEtcd

MODEL = ModelIdentity("bench")
HOST = "127.0.0.1"
_SMALL, _SMALL_NBYTES = 20_000, 4096
Results = dict[str, float]


def measure(gib: float, rounds: int, say: Callable[[str], None]) -> Results:
    nbytes = int(gib * (1 << 30))
    results: Results = {}
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        say("start-up and registering")
        results |= start_up(registry)
        say(f"one source, {nbytes} bytes in 500 tensors")
        with _source(local, "src", "blocks", str(nbytes), "500"):
            results |= one_source(registry, rounds)
        say("the demo's checkpoint")
        with _source(local, "src", "checkpoint"):
            results |= _prefixed("checkpoint", _against_naive(registry, rounds))
        for layout in ("adjacent", "scattered"):
            say(f"{_SMALL} tensors of {_SMALL_NBYTES} bytes, {layout}")
            with _source(local, "src", layout):
                results |= _prefixed(f"small_{layout}", _against_naive(registry, rounds))
        say("two sources, one of them lost at half")
        results |= failover(local, registry, nbytes, rounds)
    results |= other_ways(nbytes, rounds)
    results["plan_100000_tensors_s"] = plan_of_many(100_000)
    return results


# -- start-up
# --------------------------------------------------------------------------------------------------


def start_up(registry: Registry) -> Results:
    def run(code: str) -> float:
        return median_s(
            lambda: subprocess.run(python(code), check=True, stdout=subprocess.DEVNULL), 9
        )

    return {
        "import_registry_s": run("from engine_registry import Registry") - run("pass"),
        "engines_help_s": run(
            "sys.argv = ['engines', '--help']; from engine_cli.main import main; main()"
        ),
        "register_2500_tensors_s": register(registry, 2_500),
    }


def register(registry: Registry, count: int) -> float:
    """From `publish` to the record in etcd: keeper process started, a storage registered for each
    tensor.
    """
    tensors = {f"layer.{number}.weight": torch.zeros(1024) for number in range(count)}

    def once() -> float:
        with ExitStack() as stack:
            engine = stack.enter_context(InProcessEngine())
            start = time.perf_counter()
            stack.enter_context(
                publish(
                    registry,
                    engine,
                    instance="r",
                    rank=0,
                    world_size=1,
                    tensors=tensors,
                    model=MODEL,
                )
            )
            return time.perf_counter() - start

    return statistics.median(once() for _ in range(5))


def plan_of_many(count: int) -> float:
    """Of tensors that do not follow each other, so that each needs a separate read."""

    def manifest(base: int, step: int) -> Manifest:
        entries = [
            TensorEntry(f"t{n}", "uint8", (64,), base + n * step, 64, (64,), (0,))
            for n in range(count)
        ]
        return Manifest(tuple(entries), (Region(base, count * step),))

    src, dst = manifest(1 << 20, 128), manifest(1 << 40, 192)
    return median_s(lambda: plan([Origin("src/0", src)], dst), 3)


# -- sources
# --------------------------------------------------------------------------------------------------


@contextmanager
def _source(local: LocalEtcd, instance: str, *what: str) -> Any:
    with another_process("benchmarks.load", "serve", local.endpoint, instance, *what) as (
        process,
        _,
    ):
        yield process


def serve(endpoint: str, instance: str, what: str, *sizes: str) -> None:
    tensors = _weights(what, *map(int, sizes))
    with (
        Registry.connect(endpoint) as registry,
        MooncakeEngine(HOST) as engine,
        publish(
            registry,
            engine,
            instance=instance,
            rank=0,
            world_size=1,
            tensors=tensors,
            model=MODEL,
            options=PublishOptions(digests=True),
        ),
    ):
        click.echo("published")
        sys.stdin.read()


def _weights(what: str, nbytes: int = 0, count: int = 0) -> dict[str, torch.Tensor]:
    if what == "checkpoint":
        return read_weights([find_checkpoint()])
    if what == "blocks":
        return {
            f"t{number}": torch.randint(0, 255, (nbytes // count,), dtype=torch.uint8)
            for number in range(count)
        }
    return _small(what)


def _small(layout: str) -> dict[str, torch.Tensor]:
    """Views of one block, side by side or with gaps between them."""
    step = _SMALL_NBYTES * (1 if layout == "adjacent" else 2)
    block = torch.randint(0, 255, (_SMALL * step,), dtype=torch.uint8)
    return {
        f"t{number}": block[number * step : number * step + _SMALL_NBYTES]
        for number in range(_SMALL)
    }


# -- one source
# --------------------------------------------------------------------------------------------------


def one_source(registry: Registry, rounds: int) -> Results:
    results = _against_naive(registry, rounds)
    tensors = _destination(registry)
    with MooncakeEngine(HOST) as engine:
        load(registry, engine, "src", rank=0, tensors=tensors)
        before = _peak_rss(reset=True)
        reports = [load(registry, engine, "src", rank=0, tensors=tensors) for _ in range(rounds)]
        results["peak_extra_mib"] = (_peak_rss() - before) / (1 << 20)
        results["overhead_share"] = statistics.median(
            (one.seconds - one.transfer_s) / one.seconds for one in reports
        )
        verified = [
            load(
                registry,
                engine,
                "src",
                rank=0,
                tensors=tensors,
                options=LoadOptions(verify="digest"),
            )
            for _ in range(rounds)
        ]
        results["digest_share"] = statistics.median(one.digest_s / one.seconds for one in verified)
        nbytes = verified[0].nbytes
    results["digest_gb_per_s"] = (
        nbytes / 1e9 / median_s(lambda: digests_of(tensors, "xxh3_128"), rounds)
    )
    return results


def _destination(registry: Registry) -> dict[str, torch.Tensor]:
    """In one block where they are at the source, else each tensor in a separate storage."""
    (record,) = registry.resolve("src", 60)
    manifest = registry.manifest(record)
    tensors = allocate_like(manifest)
    return (
        tensors
        if len(manifest.regions) == 1
        else {name: tensor.clone() for name, tensor in tensors.items()}
    )


def _against_naive(registry: Registry, rounds: int) -> Results:
    """Throughput and CPU of ours and of the naive way, taking turns."""
    tensors = _destination(registry)
    ours: list[tuple[float, float]] = []
    naive: list[tuple[float, float]] = []
    reports: list[LoadReport] = []
    with MooncakeEngine(HOST) as engine, naive_load(registry, "src", tensors) as naive_way:
        nbytes = naive_way.nbytes
        for number in range(rounds + 1):
            took = (
                _timed(naive_way.run),
                _timed(
                    lambda: reports.append(load(registry, engine, "src", rank=0, tensors=tensors))
                ),
            )
            if number:  # the first round opens connections
                naive.append(took[0])
                ours.append(took[1])
    fastest = {
        name: statistics.median(one[0] for one in some)
        for name, some in (("ours", ours), ("naive", naive))
    }
    cpu = {
        name: statistics.median(one[1] for one in some)
        for name, some in (("ours", ours), ("naive", naive))
    }
    return {
        "ours_gb_per_s": nbytes / 1e9 / fastest["ours"],
        "naive_gb_per_s": nbytes / 1e9 / fastest["naive"],
        "ours_to_naive": statistics.median(n[0] / o[0] for o, n in zip(ours, naive, strict=True)),
        "our_reads_to_naive": statistics.median(
            n[0] / o.transfer_s for o, n in zip(reports[1:], naive, strict=True)
        ),
        "ours_cpu_s_per_gb": cpu["ours"] / (nbytes / 1e9),
        "naive_cpu_s_per_gb": cpu["naive"] / (nbytes / 1e9),
    }


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of this process."""
    cpu = time.process_time()
    took = seconds(action)
    return took, time.process_time() - cpu


def _peak_rss(reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


# -- two sources
# --------------------------------------------------------------------------------------------------


def failover(local: LocalEtcd, registry: Registry, nbytes: int, rounds: int) -> Results:
    """What the loss of one of two sources at half adds to a load from both, and what a lone one
    that stops costs.
    """
    results: Results = {}
    tensors = {f"t{number}": torch.zeros(nbytes // 500, dtype=torch.uint8) for number in range(500)}
    undisturbed: list[float] = []
    for fault, number in (("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)):
        disturbed: list[float] = []
        for _ in range(max(1, rounds // 2)):
            with (
                MooncakeEngine(HOST) as engine,
                _source(local, "b", "blocks", str(nbytes), "500"),
                _source(local, "a", "blocks", str(nbytes), "500") as victim,
            ):
                load(registry, engine, ["a", "b"], rank=0, tensors=tensors)
                undisturbed.append(
                    load(registry, engine, ["a", "b"], rank=0, tensors=tensors).seconds
                )

                def at_half(progress: Progress, victim: Any = victim, number: int = number) -> None:
                    if progress.nbytes * 2 >= progress.total_nbytes:
                        victim.send_signal(number)

                try:
                    disturbed.append(
                        load(
                            registry,
                            engine,
                            ["a", "b"],
                            rank=0,
                            tensors=tensors,
                            options=LoadOptions(progress=at_half),
                        ).seconds
                    )
                finally:
                    victim.kill()
        results[f"two_sources_{fault}_one_at_half_adds_s"] = statistics.median(
            disturbed
        ) - statistics.median(undisturbed)
    results["two_sources_gb_per_s"] = nbytes / 1e9 / statistics.median(undisturbed)
    return results


# -- other ways
# --------------------------------------------------------------------------------------------------


def other_ways(nbytes: int, rounds: int) -> Results:
    """The same bytes through a socket, and from a file in the page cache into memory that is there
    already.
    """
    destination = torch.zeros(nbytes, dtype=torch.uint8)
    with another_process("benchmarks.load", "send", str(nbytes)) as (_, port):
        stream = median_s(lambda: _receive(int(port), destination), rounds)
    results = {"socket_gb_per_s": nbytes / 1e9 / stream}
    tensors = _weights("blocks", nbytes, 500)
    with tempfile.TemporaryDirectory(prefix="engines-bench-") as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(tensors, path)

        def read_file() -> None:
            for name, tensor in load_file(path).items():
                tensors[name].copy_(tensor)

        results["safetensors_gb_per_s"] = nbytes / 1e9 / median_s(read_file, rounds)
    return results


def send(nbytes: str) -> None:
    """To each client, again and again, until standard input ends."""
    block = memoryview(bytearray(min(int(nbytes), 64 << 20)))
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            while True:
                peer, _ = listener.accept()
                with peer:
                    left = int(nbytes)
                    while left:
                        part = block[: min(left, len(block))]
                        peer.sendall(part)
                        left -= len(part)

        threading.Thread(target=serve, daemon=True).start()
        click.echo(listener.getsockname()[1])
        sys.stdin.read()


def _receive(port: int, into: torch.Tensor) -> None:
    view = into.numpy().data
    with socket.create_connection((HOST, port)) as peer:
        while view:
            view = view[peer.recv_into(view, min(len(view), 4 << 20)) :]


def _prefixed(prefix: str, results: Results) -> Results:
    return {f"{prefix}_{name}": value for name, value in results.items()}


@figures.program
@click.option(
    "--gib",
    type=click.FloatRange(min=0.001),
    default=2.0,
    show_default=True,
    help="Size of the rank that is loaded.",
)
@figures.rounds_option
def command(gib: float, rounds: int, as_json: bool) -> None:
    """Loading over tcp: one source and two, long and short tensors, faults. Takes minutes."""
    with engine_log():
        figures.report(measure(gib, rounds, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.load")
