"""`engines release`."""

from __future__ import annotations

import click

from engine_cli.commands.show import chosen
from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.exits import Exit
from engine_cli.logs import log_options
from engine_cli.options import Seconds, json_option, rank_option
from engine_cli.render.documents import held_json, release_json
from engine_cli.render.tables import print_json, size
from engine_cli.signals import raised
from engine_registry import Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.schema.record import MAX_VERSION
from engine_registry.schema.status import InstanceState


@click.command("release")
@instance_argument
@click.option(
    "--version",
    type=click.IntRange(0, MAX_VERSION - 1),
    metavar="N",
    help="The version; without it the newest that all ranks have.",
)
@click.option(
    "--rollback", is_flag=True, help="Take a version that is older than the released one, too."
)
@click.option(
    "--wait",
    "wait_s",
    type=Seconds(),
    default=0.0,
    show_default=True,
    metavar="S",
    help="How long to wait for all ranks to have the version.",
)
@click.option(
    "--held",
    is_flag=True,
    help="Instead of a version, free the memory that is held of ranks whose process has ended.",
)
@rank_option(required=False, help="With --held: this rank only.")
@json_option
@log_options
@etcd_options
def command(
    connect: Connect,
    instance: str,
    version: int | None,
    rollback: bool,
    wait_s: float,
    held: bool,
    rank: int | None,
    as_json: bool,
) -> int:
    """Release a version of INSTANCE: loads that ask for the released version take it from now on.

    All ranks have to hold it, as their present version or a retained one. If some do not, nothing
    is released, they are named, and the exit code is 4. It stays released until another version
    is, or rank 0 leaves.

    With --held, free the memory of its ranks that is held, on any host: their keepers let go of it
    at once. A rank whose place a process takes at the very moment is left alone, and the exit code
    is 1.
    """
    if rank is not None and not held:
        raise click.UsageError("--rank goes with --held: a version is one of all ranks")
    if held and (version is not None or rollback):
        raise click.UsageError("--held goes without --version and --rollback")
    with raised(), connect() as registry:
        if held:
            return _let_go(registry, instance, rank, as_json)
        if version is None:
            status = registry.instance(instance)
            if status.state is InstanceState.GONE:
                raise InstanceNotFound(
                    f"instance {instance!r} is not registered", "see `Registry.instances()`"
                )
            if status.version is None:
                raise InstanceIncomplete(
                    f"the ranks of {instance!r} have no version in common: {status.summary}"
                )
            version = status.version
        release = registry.rollback if rollback else registry.release
        made = release(instance, version, wait_s)
    if as_json:
        print_json(release_json(made))
    else:
        click.echo(f"{instance}: version {made.version} is released, by {made.by}")
    return Exit.DONE


def _let_go(registry: Registry, instance: str, rank: int | None, as_json: bool) -> int:
    records = [record for record in chosen(registry.instance(instance), rank) if record.held]
    if not records:
        which = f"rank {rank} of {instance!r} is not" if rank is not None else "no rank is"
        raise InstanceIncomplete(f"{which} held: nothing of {instance!r} is to be freed")
    done = registry.evict_each(records, "its memory is freed")
    freed = [record for record, was_held in zip(records, done, strict=True) if was_held]
    if as_json:
        print_json({"instance": instance, "freed": [held_json(record) for record in freed]})
    else:
        for record, was_held in zip(records, done, strict=True):
            name = f"{record.instance}/{record.rank}"
            click.echo(
                f"freed {name}: {size(record.manifest.nbytes)} on host {record.host or '?'}"
                if was_held
                else f"{name} has changed meanwhile and was left: try again"
            )
    return Exit.DONE if all(done) else Exit.FAILED
