"""`engines events`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click

from engine_cli.options import debug_option, json_option
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json
from engine_cli.runtime.kept import kept_since
from engine_cli.suggestions import did_you_mean
from engine_registry.schema.moment import moment

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST = timedelta(days=36500)


def _since(text: str) -> datetime:
    """The type of an option: a span of time before now, or a time."""
    if span := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
        ago = min(timedelta(seconds=int(span[1]) * _UNITS_S[span[2]]), _MOST)
        return datetime.now(timezone.utc) - ago
    try:
        return moment(text).astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{text!r} is not a time: use 30s, 10m, 2h, 1d or 2026-01-02T15:04:05Z."
        ) from None


@click.command("events")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("instance", required=False)
@click.option(
    "--since",
    type=_since,
    default="1h",
    show_default=True,
    metavar="AGO",
    help="From when on: 30s, 10m, 2h, 1d, or a time.",
)
@json_option
@debug_option
def command(file: Path, instance: str | None, since: datetime, as_json: bool) -> None:
    """What has happened, as a watch has kept it in FILE: of INSTANCE, or of all.

    etcd keeps no times, and its changes for minutes only. So a watch has to run all the while:
    `engines watch --keep FILE`. Each time it begins is an event, too: what happened before it was
    not seen.
    """
    names = set()
    for event in kept_since(file, since):
        if "instance" in event:
            names.add(str(event["instance"]))
        if instance is not None and event.get("instance", instance) != instance:
            continue
        if as_json:
            print_json(event)
        else:
            click.echo(f"{event['at']}  {printable(event['text'])}")
    if instance is not None and instance not in names:
        hint = did_you_mean(instance, names)
        text = f"nothing is kept of {instance} since then{f' ({hint})' if hint else ''}"
        click.echo(f"engines: {printable(text)}", err=True)
