"""A load that can be paused: `python -m tests.support.processes.load HOST NBYTES PATIENCE_S
INSTANCE…`.

Prints `half` when half has come, and goes on when it reads a line. Then it prints how the load has
ended, as JSON: the error, or what came from each source, and whether all of it is what sources
hold.
"""

from __future__ import annotations

import json
import sys

import torch

from engine_cli.options import engine_log
from engine_loader import LoaderError, LoadOptions, MooncakeEngine, Pace, Progress, load
from tests.support.processes.source import content, empty
from tests.support.registry import connect


def main(host: str, nbytes: str, patience_s: str, *instances: str) -> None:
    tensors = empty(int(nbytes))
    printed = False

    def pause_at_half(progress: Progress) -> None:
        nonlocal printed
        if not printed and progress.nbytes * 2 >= progress.total_nbytes:
            printed = True
            print("half", flush=True)
            sys.stdin.readline()

    with (
        engine_log(),
        connect() as registry,
        MooncakeEngine(host) as engine,
    ):
        pace = Pace(256 << 10, 4, stall_s=0.5, patience_s=float(patience_s))
        try:
            report = load(
                registry,
                engine,
                list(instances),
                rank=0,
                tensors=tensors,
                options=LoadOptions(pace=pace, progress=pause_at_half),
            )
        except LoaderError as exc:
            outcome: dict[str, object] = {"error": type(exc).__name__, "message": str(exc)}
        else:
            wanted = content(report.version, int(nbytes))
            outcome = {
                "nbytes": {share.name: share.nbytes for share in report.shares},
                "lost": [share.name for share in report.shares if share.error is not None],
                "exact": all(torch.equal(tensors[name], wanted[name]) for name in wanted),
            }
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
