"""Loads beside a source that updates its weights all the time: each update changes every byte."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections import Counter

import click

from benchmarks import serving
from benchmarks.gpu.loads import Place, use
from benchmarks.gpu.rows import Add, Row, Target
from benchmarks.gpu.sets import allocate, filled, flat_bytes, nbytes_of
from benchmarks.processes import another_process
from benchmarks.serving import HOST
from engine_loader import Engine, LoadOptions, LoadReport, Publication, load, open_engine
from engine_loader.options import Verify
from engine_registry import Registry
from engine_registry.errors import EngineRegistryError

GROUP = "updates"
INSTANCE = "updated"
LOADS, WRONG = "loads", "loads with wrong bytes, or of several versions"
AGAIN, VERSIONS = "loads that began again", "versions that were loaded"

_MODULE = "benchmarks.gpu.updates"
_PAUSE_S = 0.15  # at most, from one update to the next
_LIMIT_S = 300.0
_VERIFY: tuple[Verify, Verify] = ("digest", "header")


def serve_updates(endpoint: str, instance: str, *place: str) -> None:
    """Adds one to every byte with each update, so the version says what they are."""
    here = Place.of(*place)
    use(here.device)
    tensors = filled(here.layout, here.device)
    flats = flat_bytes(tensors).values()

    def update(publication: Publication) -> None:
        ended = threading.Event()

        def wait() -> None:
            sys.stdin.read()
            ended.set()

        threading.Thread(target=wait, name="waits for the end", daemon=True).start()
        click.echo("published")
        pauses = random.Random()  # noqa: S311  no secret
        while not ended.wait(pauses.uniform(0, _PAUSE_S)):
            with publication.update():
                for flat in flats:
                    flat.add_(1)

    serving.serve(
        endpoint, instance, tensors, protocol=here.protocol, digests=True, meanwhile=update
    )


def updates(
    endpoint: str, registry: Registry, src: Place, dst: Place, count: int, add: Add
) -> None:
    """Adds rows, and how often each thing happened: every load that succeeds is looked at."""
    use(dst.device)
    target = Target(allocate(dst.layout, dst.device), filled(dst.layout, dst.device))
    counts = Counter({LOADS: 0, WRONG: 0, AGAIN: 0, VERSIONS: 0})
    reports: list[LoadReport] = []

    def once(engine: Engine) -> None:
        target.poison()
        options = LoadOptions(verify=_VERIFY[len(reports) % len(_VERIFY)])
        try:
            report = load(
                registry, engine, INSTANCE, rank=0, tensors=target.tensors, options=options
            )
        except EngineRegistryError as exc:
            counts[type(exc).__name__] += 1
            return
        for flat in target.flat.values():
            flat.sub_(report.version % 256)
        counts[WRONG] += bool(target.wrong())
        reports.append(report)

    try:
        with (
            another_process(_MODULE, "serve_updates", endpoint, INSTANCE, *src.args),
            open_engine(HOST, dst.protocol) as engine,
        ):
            until = time.monotonic() + _LIMIT_S
            while len(reports) < count and time.monotonic() < until:
                once(engine)
    finally:
        counts[LOADS] = len(reports)
        counts[AGAIN] = sum(report.retries > 0 for report in reports)
        counts[VERSIONS] = len({report.version for report in reports})
        what, took = "load() beside a source that updates", [report.seconds for report in reports]
        row = Row(GROUP, what, nbytes_of(dst.layout), tuple(took), "", dst.protocol)
        add([row] if took else [], counts)
