"""Figures of start-up, publishing and loading, in one run on one machine: `python -m benchmarks.load [--json] [--gib 2]`.

Medians of several rounds. The naive load beside ours is what SGLang does: one `batch_transfer_sync_read` of all tensors, with no
header check, in the same process and between the same buffers; the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.common import median_s, report, seconds
from cli.commands.demo import find_checkpoint
from loader import InProcessEngine, MooncakeEngine, load, publish
from loader.files import allocate_like, read_weights
from loader.regions import describe
from registry import ModelIdentity, Registry
from registry.local import LocalEtcd

ROUNDS = 5
MODEL = ModelIdentity("bench")


def python(code: str) -> float:
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL))


def import_registry() -> float:
    return statistics.median(python("import registry") for _ in range(9)) - statistics.median(python("pass") for _ in range(9))


def engines_help() -> float:
    return median_s(lambda: subprocess.run(["engines", "--help"], check=True, stdout=subprocess.DEVNULL), 9)


def register_2500(registry: Registry) -> float:
    """From `publish` to the record in etcd, keeper process started, memory of 2,500 storages registered."""
    tensors = {f"layer.{number}.weight": torch.zeros(1024) for number in range(2_500)}

    def once() -> float:
        with ExitStack() as stack:
            engine = stack.enter_context(InProcessEngine())
            start = time.perf_counter()
            stack.enter_context(publish(registry, engine, instance="r", rank=0, world_size=1, tensors=tensors, model=MODEL))
            return time.perf_counter() - start

    return statistics.median(once() for _ in range(ROUNDS))


@contextmanager
def source(endpoint: str, *args: str) -> Iterator[None]:
    """Another process that publishes as instance `src` until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.load", "--serve", endpoint, *args],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        if process.stdout is None or process.stdout.readline() != "published\n":
            raise SystemExit("the source did not start")
        yield
        process.communicate()


def serve(endpoint: str, what: str) -> None:
    tensors = read_weights([find_checkpoint()]) if what == "checkpoint" else blocks(int(what))
    with (
        Registry.connect(endpoint) as registry,
        MooncakeEngine("127.0.0.1", protocol="tcp") as engine,
        publish(registry, engine, instance="src", rank=0, world_size=1, tensors=tensors, model=MODEL),
    ):
        print("published", flush=True)
        sys.stdin.read()


def blocks(nbytes: int, count: int = 500) -> dict[str, torch.Tensor]:
    """`count` tensors of random bytes, each a storage of its own."""
    return {f"t{number}": torch.randint(0, 255, (nbytes // count,), dtype=torch.uint8) for number in range(count)}


def loads(registry: Registry) -> dict[str, float]:
    """Bytes a second: ours, and the naive single call between the same buffers, in turns."""
    (record,) = registry.resolve("src", 60)
    manifest = registry.manifest(record)
    tensors = {name: tensor.clone() for name, tensor in allocate_like(manifest).items()}  # storages of their own
    here = {entry.name: entry for entry in describe(tensors).tensors}
    pairs = [(here[entry.name].addr, entry.addr, entry.nbytes) for entry in manifest.tensors if entry.nbytes]
    ours, naive = [], []
    with MooncakeEngine("127.0.0.1", protocol="tcp") as engine, MooncakeEngine("127.0.0.1", protocol="tcp") as raw:
        for region in describe(tensors).regions:
            raw.register(region)

        def one_call() -> None:
            dst, src, nbytes = map(list, zip(*pairs, strict=True))
            if raw._engine.batch_transfer_sync_read(record.session_id, dst, src, nbytes) != 0:
                raise SystemExit("the naive read failed")

        for number in range(ROUNDS + 1):
            took = seconds(one_call), load(registry, engine, "src", rank=0, tensors=tensors).seconds
            if number:  # the first round opens connections
                naive.append(took[0])
                ours.append(took[1])
    nbytes = sum(pair[2] for pair in pairs)
    return {"ours_gb_per_s": nbytes / 1e9 / statistics.median(ours), "naive_gb_per_s": nbytes / 1e9 / statistics.median(naive)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the synthetic rank")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    results: dict[str, float] = {"import_registry_s": import_registry(), "engines_help_s": engines_help()}
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        results["register_2500_tensors_s"] = register_2500(registry)
        for name, what in (("checkpoint", "checkpoint"), ("synthetic", str(int(args.gib * (1 << 30))))):
            with source(local.endpoint, what):
                results |= {f"load_{name}_{key}": value for key, value in loads(registry).items()}
    report(results, args.json)


if __name__ == "__main__":
    main()
