"""How `engines load` loads: one rank, or whole tensors, with a progress bar and into files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_cli.connection import Connect
from engine_cli.logs import as_json
from engine_cli.options import Command, engine_log
from engine_cli.runtime.serving import Endings
from engine_cli.runtime.waiting import say_why_to_wait
from engine_cli.signals import held_back
from engine_loader.loading.chosen_rank import rank_file, ranks_of
from engine_registry import RankRecord
from engine_registry.schema.record import PROTOCOLS

if TYPE_CHECKING:
    from engine_loader import LoadReport, Progress

AUTO = "auto"


@dataclass
class Loading:
    """A load with the options of the command. Returns the report, and the files that it wrote."""

    connect: Connect
    instances: tuple[str, ...]
    folder: Path | None
    force: bool
    wait_s: float
    verify: bool
    reuse: bool
    also_from: tuple[str, ...]
    host: str | None
    protocol: str
    device: str
    location: str
    raise_again: Callable[[], None]  # a signal that was dropped
    stack: ExitStack  # of what is needed as long as the weights are served

    def rank(
        self, rank: int, replica: str | None, labels: Mapping[str, str], endings: Endings
    ) -> tuple[LoadReport, list[Path]]:
        """With `replica`, from any rank with these weights; they are served under that name, with
        these labels.
        """
        path = rank_file(self.folder, rank, self.force) if self.folder is not None else None
        registry = self.stack.enter_context(self.connect())
        self.stack.enter_context(engine_log())
        say_why_to_wait(registry, self.instances, self.wait_s)
        records = ranks_of(registry, self.instances, rank, self.wait_s)
        name = f"{records[0].instance}/{rank}"
        with held_back():
            from engine_loader import LoadOptions, PublishOptions, Replica, open_engine
            from engine_loader.loading.progress_bar import progress_bar
            from engine_loader.loading.rank_file import copy_rank

        engine = self.stack.enter_context(
            open_engine(
                self.host or registry.local_address(),
                self._protocol([records[rank]]),
                self.device,
                location=self.location,
            )
        )
        with progress_bar(name, self._again, not as_json()) as on_progress:
            report = copy_rank(
                registry,
                engine,
                self.instances,
                records,
                rank,
                path,
                timeout_s=self.wait_s,
                publish=Replica(
                    replica,
                    options=PublishOptions(digests=True, labels=labels, on_state=endings.on_state),
                )
                if replica is not None
                else None,
                options=LoadOptions(
                    verify="digest" if self.verify else "auto",
                    reuse=self.reuse,
                    also_from=self.also_from or None,
                    progress=on_progress,
                ),
            )
        if report.publication is not None:
            self.stack.enter_context(report.publication)
        return report, [path] if path is not None else []

    def full(self, max_file_nbytes: int | None) -> tuple[LoadReport, list[Path]]:
        files = None
        if self.folder is not None:
            with held_back():
                from engine_loader import WholeFiles

            files = WholeFiles(self.folder, force=self.force)
        with self.connect() as registry, engine_log():
            say_why_to_wait(registry, self.instances, self.wait_s)
            records = registry.resolve(self.instances, self.wait_s)
            name = records[0].instance
            with held_back():
                from engine_loader import LoadOptions, load_full, open_engine
                from engine_loader.loading.progress_bar import progress_bar
                from engine_loader.planning.whole import MAX_FILE_NBYTES

            with (
                open_engine(
                    self.host or registry.local_address(),
                    self._protocol(records),
                    self.device,
                    location=self.location,
                ) as engine,
                files or nullcontext(),
                progress_bar(name, self._again, not as_json()) as on_progress,
            ):
                report = load_full(
                    registry,
                    engine,
                    self.instances,
                    files=files,
                    max_file_nbytes=max_file_nbytes or MAX_FILE_NBYTES,
                    timeout_s=self.wait_s,
                    options=LoadOptions(
                        verify="digest" if self.verify else "auto",
                        also_from=self.also_from or None,
                        progress=on_progress,
                    ),
                )
        return report, files.paths if files is not None else []

    def _again(self, _: Progress) -> None:
        self.raise_again()

    def _protocol(self, records: Sequence[RankRecord]) -> str:
        return protocol_of(self.protocol, records)


def protocol_option(help: str) -> Callable[[Command], Command]:
    """How to read."""
    return click.option(
        "--protocol",
        type=click.Choice((AUTO, *PROTOCOLS)),
        default=AUTO,
        show_default=True,
        help=help,
    )


def protocol_of(protocol: str, records: Sequence[RankRecord]) -> str:
    """The one that is asked for; or the quickest way to read these ranks from here."""
    if protocol != AUTO:
        return protocol
    from engine_loader.engines.protocols import protocol_for

    return protocol_for(records)
