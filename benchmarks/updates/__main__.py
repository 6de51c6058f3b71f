"""`python -m benchmarks.updates`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import delta_codec, figures, hosts, options
from benchmarks.hosts import HostsUnavailable
from benchmarks.updates.candidates.codec import NAME
from benchmarks.updates.report import goals, rows, tables
from benchmarks.updates.rounds import Sample, WrongBytes, here, linked, many, measure
from engine_cli.main import main
from engine_cli.options import engine_log
from engine_cli.render.tables import print_json
from engine_cli.signals import raised

_READERS = 4
_MANY_OF = 64  # the weights of the many updates are so much smaller
_SOCKET = "ENGINES_SOCKET_SAME_HOST"


@contextmanager
def _apart() -> Iterator[None]:
    """Processes do not read each other's memory."""
    before = os.environ.get(_SOCKET)
    os.environ[_SOCKET] = "0"
    try:
        yield
    finally:
        del os.environ[_SOCKET]
        if before is not None:
            os.environ[_SOCKET] = before


def collect(
    gib: float,
    rounds: int,
    shares: list[float],
    updates: int,
    mbit: float | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Everything. HostsUnavailable, WrongBytes."""
    samples: list[Sample] = []
    memory: dict[str, Any] = {}
    with here() as place:
        for share in shares:
            found, facts = measure(place, gib, share, rounds, say)
            samples += found
            memory = memory or facts
    if mbit is not None:
        with linked(mbit) as place:
            for share in shares:
                samples += measure(place, gib, share, rounds, say)[0]
    with here() as place:
        happened = many(place, gib / _MANY_OF, shares[0], updates, _READERS, say) if updates else {}
    memory["published_to_announced"] = memory["published_nbytes"] / memory["snapshots_nbytes"]
    document = {
        "machine": figures.machine()
        | {
            "codec of XOR": NAME,
            "torch": torch.__version__,
            "torch threads": torch.get_num_threads(),
        },
        "settings": {"gib": gib, "rounds": rounds, "shares": shares, "mbit": mbit},
        "rows": rows(samples),
        "memory": memory,
        "many": happened,
        "codec": delta_codec.measure(gib, rounds, "cpu", say),
        "samples": [asdict(one) for one in samples],
    }
    return document | {"goals": goals(document)}


@options.program
@options.gib(0.25, "Size of the weights.")
@options.rounds(5)
@options.numbers("--changed", default="2,0.1,10", help="Elements that change in a step, in %.")
@options.option(
    "--updates", type=click.IntRange(0), default=1000, help="Of smaller weights, under 4 readers."
)
@options.option("--mbit", type=click.FloatRange(1), default=1000, help="Speed of the link.")
@click.option("--loopback", is_flag=True, help="No hosts with a link, which need root.")
@click.option(
    "--report",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Measure nothing; print the tables of what --json has written.",
)
def command(
    gib: float,
    rounds: int,
    changed: str,
    updates: int,
    mbit: float,
    loopback: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """A trainer and a reader that follows it, beside other ways to do that. Takes 20 minutes.

    The hosts with a slow link are network namespaces, which needs root, and the programs ip and tc.
    """
    if report is not None:
        click.echo(tables(json.loads(report.read_text())))
        return
    shares = _shares(changed)
    if not loopback and (why := hosts.missing()) is not None:
        raise click.ClickException(why)
    with engine_log(), raised(), _apart():
        try:
            document = collect(
                gib, rounds, shares, updates, None if loopback else mbit, figures.say
            )
        except (HostsUnavailable, WrongBytes) as exc:
            raise click.ClickException(str(exc)) from exc
    if as_json:
        print_json(document)
    else:
        click.echo(tables(document))


def _shares(text: str) -> list[float]:
    """Parts of 1, of an option in %."""
    try:
        found = [float(number) / 100 for number in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < share < 1 for share in found):
        raise click.UsageError(f"--changed {text!r} is not valid: give numbers, such as 2,0.1,10")
    return found


if __name__ == "__main__":
    main(command, "benchmarks.updates")
