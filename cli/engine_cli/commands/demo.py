"""`engines demo`: the main job on one machine, with real processes, a real etcd and a real
checkpoint.

Starts an embedded etcd, two ranks (`engines register`), two loaders (`engines load`) and ends them
all. With --keep it starts a fleet instead, until Ctrl-C.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import click

from engine_cli.demo import fleet
from engine_cli.demo.checkpoint import compare, find_checkpoint, split
from engine_cli.demo.engines import INSTANCE, RANKS, Engines, next_line, say
from engine_cli.demo.failure import DemoFailed
from engine_cli.options import debug_option
from engine_cli.render.tables import size
from engine_cli.render.texts import event_text
from engine_cli.signals import raised
from engine_registry import InstanceReady, RankLost, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.etcd.local import LocalEtcd
from engine_registry.schema.printable import count

_WAIT_S = 120.0  # a rank that fails ends the demo at once


@click.command("demo")
@click.option(
    "--weights",
    type=click.Path(exists=True, dir_okay=False),
    help="Safetensors file. Default: a MiniLM checkpoint.",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Leave a fleet to try commands on, until Ctrl-C: the two ranks, a copy that serves what "
    "it has loaded, a chain of instances that load again and again, and a dashboard.",
)
@debug_option
def command(weights: str | None, keep: bool) -> None:
    """Show it all on this machine: two ranks serve a checkpoint, two processes load it, every byte
    is compared, a rank dies.
    """
    checkpoint = Path(weights) if weights else find_checkpoint()
    with raised(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engines-demo-")))
        etcd = stack.enter_context(LocalEtcd())
        say(f"etcd is ready at {etcd.endpoint}")
        registry = stack.enter_context(Registry.connect(etcd.endpoint))
        engines = Engines(etcd.endpoint)

        stages = split(checkpoint, folder, RANKS)
        say(
            f"{checkpoint.name} is divided between {RANKS} pipeline stages; each rank is a "
            "process that serves one from memory"
        )
        ranks = [
            stack.enter_context(engines.rank(rank, stage)) for rank, stage in enumerate(stages)
        ]
        _until_ready(registry, ranks)
        for process in ranks:
            click.echo(next_line(process), nl=False)
        if keep:
            fleet.keep(etcd, registry, engines, ranks)
        else:
            _show(checkpoint, folder, registry, engines, ranks)


def _show(
    checkpoint: Path,
    folder: Path,
    registry: Registry,
    engines: Engines,
    ranks: Sequence[subprocess.Popen[str]],
) -> None:
    engines.show("list")
    engines.show("show", INSTANCE)

    say(f"{RANKS} new processes resolve both ranks in etcd and load one each")
    reports = engines.load_all(folder)
    tensors, nbytes = compare(checkpoint, [Path(report["file"]) for report in reports])
    say(f"{count(tensors, 'tensor')} compared with {checkpoint.name}: equal byte for byte")

    _lose_a_rank(registry, ranks[-1])
    engines.show("list")
    _withdraw(registry, ranks[0])
    seconds = max(report["seconds"] for report in reports)
    click.echo(
        f"\n{count(tensors, 'tensor')}, {size(nbytes)}, {seconds:.3f} s, "
        f"{nbytes / 1e9 / seconds:.2f} GB/s over "
        f"{reports[0]['protocol']}, all verified"
    )


def _until_ready(registry: Registry, ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for all ranks; one that fails to start ends the demo at once."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            registry.resolve(INSTANCE, timeout_s=0.5)
            return
        except (InstanceNotFound, InstanceIncomplete):
            dead = [process.returncode for process in ranks if process.poll() is not None]
            if dead:
                raise DemoFailed(f"a rank ended with code {dead[0]}") from None
            if time.monotonic() > deadline:
                raise


def _lose_a_rank(registry: Registry, victim: subprocess.Popen[str]) -> None:
    """Kills a rank and shows what a watcher sees."""
    with registry.watch(INSTANCE) as watch:
        killed_at = 0.0
        limit = threading.Timer(_WAIT_S, watch.stop)
        limit.start()
        try:
            for event in watch:
                if isinstance(event, InstanceReady):
                    killed_at = time.monotonic()
                    victim.kill()
                elif isinstance(event, RankLost):
                    took_ms = (time.monotonic() - killed_at) * 1000
                    say(f"kill -9 of one rank's process; {took_ms:.1f} ms later a watcher sees")
                    click.echo(f"  {event_text(event)}")
                    return
        finally:
            limit.cancel()
    raise DemoFailed(f"the loss of a rank was not seen within {_WAIT_S:g} s")


def _withdraw(registry: Registry, rank: subprocess.Popen[str]) -> None:
    rank.terminate()
    if rank.wait(_WAIT_S):
        raise DemoFailed(f"the rank that was asked to withdraw ended with code {rank.returncode}")
    click.echo(next_line(rank), nl=False)
    left = registry.instances()
    if left:
        raise DemoFailed(
            f"still registered after all ranks have ended: {[status.instance for status in left]}"
        )
