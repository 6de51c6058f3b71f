"""`engines evict`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from engine_cli.commands.show import chosen
from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.exits import Exit
from engine_cli.logs import log_options
from engine_cli.options import rank_option
from engine_cli.render.texts import some_of
from engine_registry import RankRecord, Registry
from engine_registry.errors import RecordDamaged


@click.command("evict")
@instance_argument
@rank_option(required=False, help="This rank only; without it all ranks of the instance.")
@click.option(
    "--reason",
    default="",
    metavar="TEXT",
    help="Why, for the ranks and for all watches, in one line.",
)
@log_options
@etcd_options
def command(connect: Connect, instance: str, rank: int | None, reason: str) -> int:
    """Take an instance, or one rank, out of the registry.

    The processes go on, but learn that they are evicted, by whom and why, and do not come back by
    themselves. Loads
    that read from them read those bytes again. Ranks that have loaded the same content before stay,
    and are named.

    A rank that changes at the very moment is left alone, and the exit code is 1. So is a key that
    holds no record that can be read: nobody knows whose it is.
    """
    with connect() as registry:
        damaged = registry.damaged(instance, rank)
        records = []
        if not damaged or rank is None:
            records = chosen(registry.instance(instance), rank)
        evicted = registry.evict_each(records, reason)
        copies = _with_contents_of(records, registry) if any(evicted) else []
    for record, done in zip(records, evicted, strict=True):
        name = f"{record.instance}/{record.rank}"
        click.echo(
            f"evicted {name} ({record.holder})"
            if done
            else f"{name} has changed meanwhile and was left: try again"
        )
    if copies:
        click.echo(
            f"the same content is still served by {some_of(copies)}: "
            "evict these too if the bytes are wrong"
        )
    if damaged:
        raise RecordDamaged("; ".join(map(str, damaged)))
    return Exit.DONE if all(evicted) else Exit.FAILED


def _with_contents_of(gone: Sequence[RankRecord], registry: Registry) -> list[str]:
    """Other ranks with one of their contents, as "instance/rank"."""
    contents = {record.content for record in gone}
    incarnations = {record.incarnation for record in gone}
    return [
        f"{record.instance}/{record.rank}"
        for status in registry.instances()
        for record in status.records
        if record.content in contents and record.incarnation not in incarnations
    ]
