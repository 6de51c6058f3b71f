"""A bar on the terminal that shows how far a load is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from engine_loader.transfer.progress import OnProgress, Progress


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
            bar.update(task, completed=progress.nbytes, total=progress.total_nbytes)

        yield on_progress
