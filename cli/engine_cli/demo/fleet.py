"""The fleet that `engines demo --keep` leaves until Ctrl-C: the ranks of the demo, an instance that
is a copy of it, a chain of instances that load again and again, and a dashboard.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from engine_cli.demo.engines import INSTANCE, RANKS, Engines, next_line, say
from engine_cli.demo.failure import DemoFailed
from engine_cli.demo.link import LOAD_S
from engine_cli.signals import on_ending
from engine_registry import RankJoined, Registry
from engine_registry.etcd.local import LocalEtcd

COPY = "copy"
LINKS = ("link-1", "link-2", "link-3")
_WAIT_S = 120.0


def keep(
    etcd: LocalEtcd,
    registry: Registry,
    engines: Engines,
    ranks: Sequence[subprocess.Popen[str]],
) -> None:
    """Until a signal. The ranks are asked to end then, with all that is started here."""
    stop = threading.Event()
    with ExitStack() as stack:
        say(f"{RANKS} new processes load a rank each, and serve what has come as {COPY}")
        copies = [stack.enter_context(engines.copy(COPY, rank)) for rank in range(RANKS)]
        for process in copies:
            _show_start(process)
        say(
            f"{', '.join(LINKS)} load again and again, each from another one that loads where it "
            f"can. They wait between chunks, so that a load takes {LOAD_S:.0f} s"
        )
        links = [stack.enter_context(engines.link(name)) for name in LINKS]
        _until_joined(registry, links)
        engines.show("list")
        dashboard = _dashboard(registry, stack)
        on_ending(stop.set)
        say(f"the fleet runs until Ctrl-C; {dashboard}")
        _say_what_to_try(f"--etcd {etcd.endpoint}", copies[-1].pid)
        while not stop.wait(0.5):
            etcd.check_running()
        for process in [*links, *copies, *ranks]:
            process.terminate()
    click.echo("the fleet has ended")


def _show_start(copy: subprocess.Popen[str]) -> None:
    for _ in range(2):  # loaded, serving
        line = next_line(copy)
        if not line:
            raise DemoFailed(f"a copy ended with code {copy.wait()}")
        click.echo(line, nl=False)


def _until_joined(registry: Registry, links: Sequence[subprocess.Popen[str]]) -> None:
    """Until each rank of each link has registered, to load."""
    missing = {(name, rank) for name in LINKS for rank in range(RANKS)}
    deadline = time.monotonic() + _WAIT_S
    with registry.watch() as watch:
        while missing:
            event = watch.next(0.5)
            if isinstance(event, RankJoined):
                missing.discard((event.record.instance, event.record.rank))
            elif any(link.poll() is not None for link in links):
                raise DemoFailed("a link of the chain has ended")
            elif time.monotonic() > deadline:
                raise DemoFailed(f"no link of the chain loads after {_WAIT_S:g} s")


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
  {program} show {INSTANCE} {where}    # the chain is a tree
  {program} list --watch {where}
  {program} load {INSTANCE} {COPY} --rank 0 --out loaded {where}
  {program} load {INSTANCE} --full --out whole {where}
  kill -9 {victim}    # rank {RANKS - 1} of {COPY}
  {program} evict {COPY} {where}    # what is left of it
  {program} doctor --peer {INSTANCE} {where}"""
    )
