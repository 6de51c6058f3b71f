"""`python -m benchmarks.peers`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import click

from benchmarks import figures, options
from benchmarks.hosts import HostsUnavailable
from benchmarks.peers.candidates import CANDIDATES
from benchmarks.peers.machine import machine
from benchmarks.peers.parts import LINKS, PARTS, ROUNDS, Extent, ReferenceFailed
from benchmarks.peers.report import page_with, tables
from benchmarks.peers.results import PartResults, SettingsDiffer, collected
from benchmarks.peers.sides import PEERS, none_left
from benchmarks.peers.weights import SETS
from engine_cli.main import main
from engine_cli.options import debug_option
from engine_cli.signals import raised

_file = click.Path(dir_okay=False, writable=True, path_type=Path)
_REPORT = "report"
_ROUNDS = ", ".join(f"{rounds} of {part}" for part, rounds in ROUNDS.items())


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)


@click.command("command", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice([*PARTS, _REPORT]), metavar="[PART]…")
@click.option("--only", default="", metavar="CANDIDATE[,…]", help=f"Of {_listed(CANDIDATES)}.")
@click.option(
    "--set", "sets", default="", metavar="SET[,…]", help=f"Of the part loopback: {_listed(SETS)}."
)
@click.option(
    "--link", "links", default="", metavar="LINK[,…]", help=f"Of the part hosts: {_listed(LINKS)}."
)
@click.option("--rounds", type=click.IntRange(min=1), help=f"By default {_ROUNDS}.")
@options.option("--pairs", type=click.IntRange(min=1), default=3, help="Of loads in each turn.")
@options.option(
    "--scale", type=click.FloatRange(0.0001, 1), default=1.0, help="How much of each set."
)
@click.option("--again", is_flag=True, help="Forget what was found of what is chosen.")
@options.option(
    "--results",
    type=click.Path(path_type=Path),
    default=PEERS / "results",
    help="Folder that keeps what is found; a run goes on where the one before has stopped. The "
    "part report reads what --json has written, too.",
    show_default=".peers/results",
)
@click.option("--json", "document", type=_file, metavar="FILE", help="Write all that was found.")
@click.option("--page", type=_file, metavar="FILE", help="Write the tables into this page.")
@debug_option
def command(
    parts: Sequence[str],
    only: str,
    sets: str,
    links: str,
    rounds: int | None,
    pairs: int,
    scale: float,
    again: bool,
    results: Path,
    document: Path | None,
    page: Path | None,
) -> None:
    """Loads beside those of other products, all on this machine. Takes two hours.

    \b
    Parts, all of them by default:
      loopback  the sets, in turns with one plain socket: an hour
      hosts     over links of limited speed and with a delay, between network namespaces;
                needs root
      kills     from a kill of the source to an error at the reader
      idle      CPU of sides that have nothing to do
      report    measures nothing, and prints what was found before
    The products are in .peers, which scripts/peers_setup.sh makes.
    """

    chosen = _chosen("--only", only, CANDIDATES), _chosen("--set", sets, SETS)
    chosen_links = _chosen("--link", links, LINKS)
    here = machine()
    with raised(), none_left():
        for part in [part for part in parts or PARTS if part != _REPORT]:
            path = results / f"{part}.json"
            extent = Extent(*chosen, chosen_links, rounds or ROUNDS[part], pairs, scale)
            try:
                found = PartResults(path, {"scale": scale, "pairs": pairs}, here)
                if again:
                    found.forget(extent.has)
                PARTS[part](extent, found, figures.say)
            except (HostsUnavailable, ReferenceFailed, SettingsDiffer) as exc:
                raise click.ClickException(str(exc)) from exc
    everything = collected(results)
    written = tables(everything)
    click.echo(written)
    if document is not None:
        document.write_text(json.dumps(everything) + "\n")
    if page is not None:
        page.write_text(page_with(page.read_text(), written))


def _chosen(option: str, text: str, known: Collection[str]) -> list[str]:
    """In the order in which they are known; all of them where the text is empty."""
    names = {name.strip() for name in text.split(",") if name.strip()}
    if names - set(known):
        raise click.UsageError(f"{option} {text!r} is not valid: it is some of {_listed(known)}")
    return [name for name in known if not names or name in names]


if __name__ == "__main__":
    main(command, "benchmarks.peers")
