"""The fleet that `engines demo --keep` leaves until Ctrl-C: the ranks of the demo, two instances
that are copies of it, and a dashboard.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from engine_cli.demo.engines import INSTANCE, RANKS, Engines, next_line, say
from engine_cli.demo.failure import DemoFailed
from engine_cli.signals import on_ending
from engine_registry import Registry
from engine_registry.etcd.local import LocalEtcd

COPIES = ("copy-1", "copy-2")


def keep(
    etcd: LocalEtcd,
    registry: Registry,
    engines: Engines,
    ranks: Sequence[subprocess.Popen[str]],
) -> None:
    """Until a signal. The ranks are asked to end then, with all that is started here."""
    stop = threading.Event()
    with ExitStack() as stack:
        say(
            f"{len(COPIES) * RANKS} new processes load a rank each, all at once, and serve what "
            "has come: the last ones may read from the first ones"
        )
        copies = [
            stack.enter_context(engines.copy(name, rank))
            for name in COPIES
            for rank in range(RANKS)
        ]
        for process in copies:
            _show_start(process)
        engines.show("list")
        dashboard = _dashboard(registry, stack)
        on_ending(stop.set)
        say(f"the fleet runs until Ctrl-C; {dashboard}")
        _say_what_to_try(f"--etcd {etcd.endpoint}", copies[-1].pid)
        while not stop.wait(0.5):
            etcd.check_running()
        for process in [*copies, *ranks]:
            process.terminate()
    click.echo("the fleet has ended")


def _show_start(copy: subprocess.Popen[str]) -> None:
    for _ in range(2):  # loaded, serving
        line = next_line(copy)
        if not line:
            raise DemoFailed(f"a copy ended with code {copy.wait()}")
        click.echo(line, nl=False)


def _dashboard(registry: Registry, stack: ExitStack) -> str:
    """Where it is, or what it lacks."""
    try:
        from engine_cli.dashboard.server import Dashboard
    except ModuleNotFoundError:
        return "a dashboard needs pip install 'engine-registry[gateway]'"
    return f"its dashboard is {stack.enter_context(Dashboard(registry, port=0)).url}"


def _say_what_to_try(where: str, victim: int) -> None:
    program = sys.argv[0] if Path(sys.argv[0]).name == "engines" else "engines"
    click.echo(
        f"""
Try in another terminal:
  {program} watch {where}
  {program} show {INSTANCE} {where}
  {program} load {INSTANCE} {COPIES[0]} --rank 0 --out loaded {where}
  {program} load {INSTANCE} --full --out whole {where}
  kill -9 {victim}    # rank {RANKS - 1} of {COPIES[-1]}
  {program} evict {COPIES[-1]} {where}    # what is left of it
  {program} doctor --peer {INSTANCE} {where}"""
    )
