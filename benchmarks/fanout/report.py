"""What a fan-out has found, as tables, JSON or a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from benchmarks.fanout.plot import svg
from benchmarks.fanout.run import STRATEGIES, Run, Setting, on_paper
from benchmarks.figures import machine
from engine_cli.render.tables import print_json, print_table


def report(runs: Sequence[Run], killed: Sequence[Run], setting: Setting, as_json: bool) -> None:
    rows = [asdict(run) | {"seconds_on_paper": on_paper(run, setting)} for run in runs]
    undisturbed = runs[-1].seconds  # the longest chain comes last
    losses = [asdict(run) | {"added_seconds": run.seconds - undisturbed} for run in killed]
    if as_json:
        print_json(
            {
                "machine": machine(),
                "setting": asdict(setting),
                "results": _rounded(rows),
                "kills": _rounded(losses),
            }
        )
        return
    ones = {run.strategy: run.seconds for run in runs if run.receivers == 1}
    print_table(
        ("STRATEGY", "RECEIVERS", "SECONDS", "ON PAPER", "× ONE", "SEED SENT", "CPU", "EXACT"),
        [
            (
                run.strategy.replace("_", " "),
                str(run.receivers),
                f"{run.seconds:.2f}",
                f"{on_paper(run, setting):.2f}",
                f"{run.seconds / ones[run.strategy]:.2f}" if run.strategy in ones else "",
                f"{run.seed_sent:.2f} ×",
                f"{run.cpu:.0%}",
                "yes" if run.exact else "NO",
            )
            for run in runs
        ],
    )
    if not killed:
        return
    click.echo()
    print_table(
        ("ONE KILLED AT", "SECONDS", "ADDED", "SEED SENT", "EXACT"),
        [
            (
                f"{run.killed_at:.0%}",
                f"{run.seconds:.2f}",
                f"{run.seconds - undisturbed:+.2f}",
                f"{run.seed_sent:.2f} ×",
                "yes" if run.exact else "NO",
            )
            for run in killed
        ],
    )


def _rounded(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in row.items()
        }
        for row in rows
    ]


def plot_of(runs: Sequence[Run], setting: Setting) -> str:
    """As SVG."""
    lines = {
        strategy.replace("_", " "): [
            (run.receivers, run.seconds, on_paper(run, setting))
            for run in runs
            if run.strategy == strategy
        ]
        for strategy in STRATEGIES
    }
    return svg(
        f"{setting.nbytes / 1e6:.0f} MB to N receivers, links of {setting.mbit:g} Mbit/s", lines
    )
