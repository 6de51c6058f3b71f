"""Loads in a loop: `follower INSTANCE NBYTES`. Prints `loaded VERSION` after each load that brought
the words of that version and nothing else, and the kind of the error after one that failed.

A mix of versions, or words of nobody, end it with a traceback. Ends with its input.
"""

from __future__ import annotations

import sys
import threading

import torch

from engine_cli.options import engine_log
from engine_loader import LoadOptions, MooncakeEngine, Pace, load
from engine_registry.errors import EngineRegistryError
from tests.support.launches import WORD, Origin, origins, the_origin
from tests.support.registry import connect


def main(instance: str, nbytes: str) -> None:
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    found = {"w": torch.zeros(int(nbytes) // WORD, dtype=torch.int64)}
    pace = Pace(256 << 10, 4, stall_s=2.0, patience_s=20.0)
    with (
        engine_log(),
        connect() as registry,
        MooncakeEngine("127.0.0.1") as engine,
    ):
        while not ended.is_set():
            found["w"].zero_()
            try:
                report = load(
                    registry,
                    engine,
                    instance,
                    rank=0,
                    tensors=found,
                    timeout_s=20.0,
                    options=LoadOptions(pace=pace),
                )
            except EngineRegistryError as exc:
                print(type(exc).__name__, exc, flush=True)
                continue
            origin = the_origin(origins(found["w"]))
            if origin != Origin(0, report.version):
                raise AssertionError(f"{origin} in version {report.version}")
            print(f"loaded {report.version}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
