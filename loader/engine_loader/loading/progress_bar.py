"""A bar on the terminal that shows how far a load or a read of files is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from engine_loader.transfer.progress import OnProgress, Progress
from engine_registry.schema.keys import ENGINES

_SILENT_S = 3.0  # less is no news: a source that others can stand in for is given up by then


@contextmanager
def progress_bar(
    name: str, also: Callable[[Progress], object] | None = None, shown: bool = True
) -> Iterator[OnProgress]:
    """On stderr, if that is a terminal, until the block ends. `also` gets every progress, too."""
    console = Console(file=sys.stderr)
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Bar(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=None)

        def on_progress(progress: Progress) -> None:
            if also is not None:
                also(progress)
            bar.update(
                task,
                description=": ".join(filter(None, [name, silence(progress)])),
                completed=progress.nbytes,
                total=progress.total_nbytes,
            )

        yield on_progress


def silence(progress: Progress) -> str:
    """Which source has brought nothing for how long; empty where that is no news."""
    some = [one for one in progress.silent if one.seconds >= _SILENT_S]
    if not some:
        return ""
    others = f" and {len(some) - 1} more" if len(some) > 1 else ""
    source = some[0].source.removeprefix(ENGINES)
    return f"nothing has come for {some[0].seconds:.0f} s from {source}{others}"
