"""`engines wait`."""

from __future__ import annotations

import time

import click

from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.logs import log_options
from engine_cli.options import Seconds, json_option
from engine_cli.render.documents import instance_json
from engine_cli.render.tables import print_json
from engine_cli.render.texts import ready_text
from engine_cli.runtime.waiting import say_why_to_wait
from engine_cli.signals import raised
from engine_registry import InstanceGone, InstanceState, InstanceStatus, Registry
from engine_registry.errors import RegistryError
from engine_registry.schema.printable import count


@click.command("wait")
@instance_argument
@click.option(
    "--for",
    "state",
    type=click.Choice([InstanceState.READY.value, InstanceState.GONE.value]),
    default=InstanceState.READY.value,
    show_default=True,
    help="ready: all ranks are there, of one version. gone: none is.",
)
@click.option(
    "--wait",
    "wait_s",
    type=Seconds(),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long to wait at most.",
)
@json_option
@log_options
@etcd_options
def command(connect: Connect, instance: str, state: str, wait_s: float, as_json: bool) -> None:
    """Wait until INSTANCE is ready, or gone: for scripts, and for readiness probes.

    Ends at once with 0 when it is so. If it is not in time, the exit code is 4 for an instance that
    is not ready, and 1 for one that is not gone, and the reason is said.
    """
    with raised(), connect() as registry:
        if state == InstanceState.READY.value:
            say_why_to_wait(registry, [instance], wait_s)
            (status,) = registry.ready(instance, wait_s)
        else:
            status = _when_gone(registry, instance, wait_s)
    if as_json:
        print_json(instance_json(status))
    elif status.state is InstanceState.READY:
        click.echo(ready_text(status))
    else:
        click.echo(f"{instance} gone")


def _when_gone(registry: Registry, instance: str, wait_s: float) -> InstanceStatus:
    deadline = time.monotonic() + wait_s
    with registry.watch(instance) as watch:
        while (status := registry.instance(instance)).state is not InstanceState.GONE:
            event = None
            while not isinstance(event, InstanceGone):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise RegistryError(
                        f"instance {instance!r} is not gone after {wait_s:.3g} s: it still has "
                        f"{count(len(status.records), 'rank')}",
                        "end its processes, or use `Registry.evict`",
                    )
                event = watch.next(left_s)
    return status
