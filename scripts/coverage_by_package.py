"""Prints how much of each package the tests have run, from the data of the last run with --cov:
lines and branches.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import coverage
from rich.console import Console
from rich.table import Table

COUNTS = ("covered_lines", "num_statements", "covered_branches", "num_branches")


def by_package(files: dict[str, dict[str, dict[str, int]]]) -> dict[str, Counter[str]]:
    """The counts of all files of each top-level folder."""
    packages: dict[str, Counter[str]] = {}
    for name, file in files.items():
        counts = packages.setdefault(Path(name).parts[0], Counter())
        counts.update({count: file["summary"][count] for count in COUNTS})
    return packages


def percent(covered: int, total: int) -> str:
    return f"{100 * covered / total:.1f} %" if total else "–"


def main() -> None:
    measured = coverage.Coverage()
    measured.load()
    if not measured.get_data().measured_files():
        sys.exit("no coverage was measured: run pytest with --cov first")
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        measured.json_report(outfile=report.name)
        packages = by_package(json.loads(Path(report.name).read_text())["files"])
    table = Table("package", "lines", "branches", title="run by the tests", box=None)
    for name, counts in sorted(packages.items()):
        lines = percent(counts["covered_lines"], counts["num_statements"])
        table.add_row(name, lines, percent(counts["covered_branches"], counts["num_branches"]))
    Console().print(table)


if __name__ == "__main__":
    main()
