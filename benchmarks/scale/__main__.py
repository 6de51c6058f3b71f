"""`python -m benchmarks.scale`: what the registry costs as everything grows. All parts take up
to an hour, as the joins at once share one process; `--quick` takes less than two minutes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from benchmarks import figures
from benchmarks.scale import zones
from benchmarks.scale.chains import chains
from benchmarks.scale.choices import choices
from benchmarks.scale.claims import claims
from benchmarks.scale.figures import Found, Say, Table, text_of
from benchmarks.scale.goals import Verdict, verdicts
from benchmarks.scale.herds import herds
from benchmarks.scale.joins import among_instances, among_ranks, at_once
from benchmarks.scale.layouts import layouts
from benchmarks.scale.listings import listings
from benchmarks.scale.losses import losses
from benchmarks.scale.renewals import renewals
from benchmarks.scale.sizes import QUICK, WHOLE, Sizes
from benchmarks.scale.sockets import sockets
from benchmarks.scale.watchers import watchers
from engine_cli.main import main
from engine_cli.options import debug_option
from engine_cli.render.tables import print_table
from engine_cli.signals import raised

Series = Callable[[Sizes, Say], Found]
PARTS: dict[str, Sequence[Series]] = {
    "join": (among_ranks, among_instances, at_once),
    "claim": (claims,),
    "herd": (herds,),
    "renewal": (renewals,),
    "sockets": (sockets,),
    "watcher": (watchers,),
    "list": (listings,),
    "choice": (choices,),
    "layout": (layouts,),
    "chain": (chains,),
    "zone": (zones.at_once, zones.among_instances),
    "loss": (losses,),
}


@click.command("command", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("parts", nargs=-1, type=click.Choice(list(PARTS)), metavar="[PART]…")
@click.option("--quick", is_flag=True, help="Small sizes: to see that it runs.")
@click.option(
    "--json",
    "path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write everything to this file, too.",
)
@debug_option
def command(parts: Sequence[str], quick: bool, path: Path | None) -> None:
    """The registry as ranks, instances and joiners grow: requests and bytes, CPU and sockets."""
    logging.getLogger("engine_loader").setLevel(logging.ERROR)
    found = Found()
    with raised():
        for series in [series for part in parts or PARTS for series in PARTS[part]]:
            measured = series(QUICK if quick else WHOLE, figures.say)
            for table in measured.tables:
                _print(table)
            found.add(measured)
    judged = verdicts(found.figures)
    _print_goals(judged)
    if path is not None:
        path.write_text(json.dumps(_document(found, judged, quick), indent=1) + "\n")


def _print(table: Table) -> None:
    click.echo(f"\n{table.title}")
    print_table(table.columns, [list(map(text_of, row)) for row in table.rows])
    if table.note:
        click.echo(table.note)


def _print_goals(judged: Sequence[Verdict]) -> None:
    click.echo("\nGoals")
    columns = ("GOAL", "AT MOST", "MEASURED", "VERDICT")
    rows = [
        (
            each.goal.what,
            text_of(each.goal.most),
            text_of("" if each.value is None else each.value),
            each.said,
        )
        for each in judged
    ]
    print_table(columns, rows)


def _document(found: Found, judged: Sequence[Verdict], quick: bool) -> dict[str, object]:
    return {
        "machine": figures.machine(),
        "quick": quick,
        **found.to_json(),
        "goals": [
            {
                "goal": each.goal.what,
                "figure": each.goal.figure,
                "most": each.goal.most,
                "value": each.value,
                "verdict": each.said,
            }
            for each in judged
        ],
    }


if __name__ == "__main__":
    main(command, "benchmarks.scale")
