"""Start-up, publishing and loading over tcp on this machine, medians of several rounds, baselines
in turns.

*naive* is what SGLang does: one `batch_transfer_sync_read` of all tensors, with no check of
anything, between the same buffers, its addresses known. Ours is the whole `load`: resolve,
manifest, plan, reads, checks; `our_reads_to_naive` compares the reads alone.
*socket* is one stream through a plain socket into the same memory, *safetensors* a file that lies
in the page cache. Sources are separate processes.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import figures, options
from benchmarks.figures import Results
from benchmarks.load.failover import failover
from benchmarks.load.one_source import against_naive, one_source
from benchmarks.load.preparation import plan_of_many, start_up
from benchmarks.load.rivals import other_ways
from benchmarks.load.sources import SMALL, SMALL_NBYTES, source
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd


def measure(gib: float, rounds: int, say: Callable[[str], None]) -> Results:
    nbytes = int(gib * (1 << 30))
    results: Results = {}
    with LocalEtcd() as local, Registry.connect(local.endpoint) as registry:
        say("start-up and registering")
        results |= start_up(registry)
        say(f"one source, {nbytes} bytes in 500 tensors")
        with source(local, "src", "blocks", str(nbytes), "500"):
            results |= one_source(registry, rounds)
        say("the demo's checkpoint")
        with source(local, "src", "checkpoint"):
            results |= _prefixed("checkpoint", against_naive(registry, rounds))
        for layout in ("adjacent", "scattered"):
            say(f"{SMALL} tensors of {SMALL_NBYTES} bytes, {layout}")
            with source(local, "src", layout):
                results |= _prefixed(f"small_{layout}", against_naive(registry, rounds))
        say("two sources, one of them lost at half")
        results |= failover(local, registry, nbytes, rounds)
    results |= other_ways(nbytes, rounds)
    results["plan_100000_tensors_s"] = plan_of_many(100_000)
    return results


def _prefixed(prefix: str, results: Results) -> Results:
    return {f"{prefix}_{name}": value for name, value in results.items()}


@options.program
@options.gib(2.0, "Size of the rank that is loaded.")
@options.rounds(5)
def command(gib: float, rounds: int, as_json: bool) -> None:
    """Loading over tcp: one source and two, long and short tensors, faults. Takes minutes."""
    with engine_log():
        figures.report(measure(gib, rounds, figures.say), as_json)


if __name__ == "__main__":
    main(command, "benchmarks.load")
