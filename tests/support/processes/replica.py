"""A rank that loads and serves at the same time: `python -m tests.support.processes.replica
INSTANCE NBYTES PAUSE_S [LOCATION]`.

Waits for a line, then loads the model of `source`, waiting so long after everything that comes, and
publishes itself. Prints `half` when half has come, and in the end `loaded VERSION equal|differs
SOURCES`, or `failed` and the error. They differ unless every word is of one launch and that
version. Then it serves. Ends with its input, or killed.
"""

from __future__ import annotations

import sys
import time

from engine_cli.options import engine_log
from engine_loader import LoaderError, LoadOptions, Progress, load
from engine_registry import RegistryError
from tests.support.launches import origins_of_bytes
from tests.support.processes.source import MODEL, empty
from tests.support.registry import connect
from tests.support.transfer import engine_at


def main(instance: str, size: str, pause: str, location: str = "") -> None:
    nbytes, pause_s = int(size), float(pause)
    tensors = empty(nbytes)
    printed = False

    def on_progress(progress: Progress) -> None:
        nonlocal printed
        time.sleep(pause_s)
        if progress.nbytes >= progress.total_nbytes / 2 and not printed:
            printed = True
            print("half", flush=True)

    with (
        engine_log(),
        connect() as registry,
        engine_at("127.0.0.1", location) as engine,
    ):
        print("up", flush=True)
        sys.stdin.readline()
        try:
            report = load(
                registry,
                engine,
                MODEL,
                rank=0,
                tensors=tensors,
                publish=instance,
                options=LoadOptions(progress=on_progress),
            )
        except (LoaderError, RegistryError) as exc:
            print(f"failed {type(exc).__name__}: {exc}", flush=True)
            return
        found = origins_of_bytes(tensors)
        equal = [origin.version if origin else None for origin in found] == [report.version]
        sources = ",".join(share.name for share in report.shares if share.nbytes)
        print(f"loaded {report.version} {'equal' if equal else 'differs'} {sources}", flush=True)
        sys.stdin.read()
        if report.publication is not None:
            report.publication.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
