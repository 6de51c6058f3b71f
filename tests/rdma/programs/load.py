"""Loads what a `source` or `shards` serves, and says whose the bytes are: `load HOST INSTANCE[,…]`.

`-` in the place of instances is any instance of the sources' model.

Prints `engine`, then one JSON line for each load: what came from each source, and the origin that
all words name, or the error. With `--pause` it prints `paused` when half has come, and goes on when
it reads a line; with `--crawl S` too, it goes on before that, by a step every S seconds. With
`--again` it loads once more for each line.
"""

from __future__ import annotations

import argparse
import json
import select
import sys
import time
from contextlib import ExitStack

import torch

from engine_cli.options import engine_log
from engine_loader import LoadOptions, Pace, Progress, Replica, Shard, load
from engine_registry.errors import EngineRegistryError
from tests.support.launches import Origin, origins, origins_of_bytes, the_origin
from tests.support.processes.shards import NAME, shape_of
from tests.support.processes.source import MODEL, empty
from tests.support.registry import connect
from tests.support.transfer import engine_at


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("instances")
    parser.add_argument("--nbytes", type=int, required=True)
    parser.add_argument("--count", type=int, default=16, help="Tensors of a source.")
    parser.add_argument("--columns", help="LOW:HIGH of the matrix of shards.")
    parser.add_argument("--verify", default="header")
    parser.add_argument("--chunk", type=int, default=256 << 10)
    parser.add_argument("--stall", type=float, default=10.0)
    parser.add_argument("--patience", type=float, default=60.0)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--serve", help="An instance that passes on what has come.")
    parser.add_argument("--pause", action="store_true")
    parser.add_argument("--crawl", type=float)
    parser.add_argument("--again", action="store_true")
    return parser.parse_args()


class Wanted:
    """The tensors to fill, and whose they are afterwards."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.shards: dict[str, Shard] | None = None
        self.columns: tuple[int, int] | None = None
        if given.columns is None:
            self.tensors = empty(given.nbytes, given.count)
            return
        low, high = (int(end) for end in given.columns.split(":"))
        self.columns, self.shape = (low, high), shape_of(given.nbytes)
        self.tensors = {NAME: torch.zeros(self.shape[0], high - low, dtype=torch.int64)}
        self.shards = {NAME: Shard(self.shape, (0, low))}

    def clear(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    def origin(self) -> Origin:
        if self.columns is None:
            return the_origin(origins_of_bytes(self.tensors))
        places = torch.arange(self.shape[0] * self.shape[1]).view(self.shape)
        low, high = self.columns
        return the_origin(origins(self.tensors[NAME], places[:, low:high].contiguous()))


def main() -> None:
    given = arguments()
    wanted = Wanted(given)
    paused, going = False, not given.pause

    def progress(now: Progress) -> None:
        nonlocal paused, going
        if going or now.nbytes * 2 < now.total_nbytes:
            return
        if not paused:
            paused = True
            print("paused", flush=True)
        going = bool(select.select([sys.stdin], [], [], given.crawl)[0])
        if going:
            sys.stdin.readline()

    stall_s = given.stall
    pace = Pace(given.chunk, 4, stall_s=stall_s, starve_s=stall_s, patience_s=given.patience)
    options = LoadOptions(pace=pace, progress=progress, verify=given.verify)
    with engine_log(), connect() as registry, engine_at(given.host) as engine, ExitStack() as stack:
        print("engine", flush=True)
        while True:
            wanted.clear()
            start = time.monotonic()
            try:
                report = load(
                    registry,
                    engine,
                    MODEL if given.instances == "-" else given.instances.split(","),
                    tensors=wanted.tensors,
                    shards=wanted.shards,
                    rank=None if wanted.shards else 0,
                    timeout_s=given.timeout,
                    publish=Replica(given.serve, 0) if given.serve else False,
                    options=options,
                )
            except EngineRegistryError as exc:
                outcome: dict[str, object] = {"error": type(exc).__name__, "message": str(exc)}
            else:
                if report.publication is not None:
                    stack.enter_context(report.publication)
                origin = wanted.origin()
                outcome = {
                    "protocol": report.protocol,
                    "nbytes": {_short(share.name): share.nbytes for share in report.shares},
                    "lost": {
                        _short(share.name): str(share.error)
                        for share in report.shares
                        if share.error
                    },
                    "retries": report.retries,
                    "version": report.version,
                    "origin": [origin.launch, origin.version, origin.rank],
                }
            outcome["seconds"] = round(time.monotonic() - start, 1)
            print(json.dumps(outcome), flush=True)
            if given.serve:
                sys.stdin.readline()
            if not given.again or not sys.stdin.readline():
                return


def _short(name: str) -> str:
    """INSTANCE/RANK."""
    return name.removeprefix("/engines/")


if __name__ == "__main__":
    main()
