"""How `engines load` loads: one rank, or whole tensors, with a progress bar and into files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from engine_cli.logs import as_json
from engine_cli.options import engine_log
from engine_cli.runtime.serving import Endings
from engine_cli.signals import held_back
from engine_registry import RankRecord, Registry
from engine_registry.errors import InstanceIncomplete, InvalidField
from engine_registry.schema.record import GATEWAY

if TYPE_CHECKING:
    from engine_loader import LoadReport, Progress

AUTO = "auto"


@dataclass
class Loading:
    """A load with the options of the command. Returns the report, and the files that it wrote."""

    connect: Callable[[], Registry]
    instances: tuple[str, ...]
    folder: Path | None
    force: bool
    wait_s: float
    verify: bool
    host: str | None
    protocol: str
    raise_again: Callable[[], None]  # a signal that was dropped
    stack: ExitStack  # of what is needed as long as the weights are served

    def rank(
        self, rank: int, replica: str | None, endings: Endings
    ) -> tuple[LoadReport, list[Path]]:
        """With `replica`, from any rank with these weights; they are served under that name."""
        path = self.folder / f"rank-{rank}.safetensors" if self.folder else None
        if path is not None and path.exists() and not self.force:
            raise InvalidField(
                f"{path} is there already", "choose another --out, or --force", field="out"
            )
        registry = self.stack.enter_context(self.connect())
        self.stack.enter_context(engine_log())
        records = registry.resolve(self.instances, self.wait_s)
        if rank >= len(records):
            raise InvalidField(
                f"rank {rank} is not one of {records[0].instance!r}: its ranks are 0 to "
                f"{len(records) - 1}",
                field="rank",
            )
        record = records[rank]
        if record.kept_by == GATEWAY:
            raise InstanceIncomplete(
                f"{record.key} is an SGLang seed, which states neither dtypes nor shapes and has "
                "no header to check reads by",
                "load it with SGLang, through `engines gateway`",
            )
        with held_back():
            from engine_loader import LoadOptions, MooncakeEngine, PublishOptions, Replica, load
            from engine_loader.files.format import check_storable
            from engine_loader.files.memory import allocate_like, shards_like
            from engine_loader.files.weights import write_weights

        manifest = registry.manifest(record)
        if path is not None:
            check_storable(
                path, {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}
            )
        tensors = allocate_like(manifest)
        engine = self.stack.enter_context(
            MooncakeEngine(self.host or registry.local_address(), self._protocol([record]))
        )
        with _bar(f"{record.instance}/{rank}", self.raise_again) as on_progress:
            report = load(
                registry,
                engine,
                self.instances if replica is None else record.model,
                rank=rank,
                tensors=tensors,
                shards=shards_like(manifest),
                timeout_s=self.wait_s,
                options=LoadOptions(
                    verify="digest" if self.verify else "header",
                    contents=None if replica is None else [one.content for one in records],
                    progress=on_progress,
                ),
                world_size=record.world_size,
                topology=record.topology,
                publish=Replica(
                    replica, options=PublishOptions(digests=True, on_state=endings.on_state)
                )
                if replica is not None
                else False,
            )
        if report.publication is not None:
            self.stack.enter_context(report.publication)
        if path is not None:
            write_weights(tensors, path)
        return report, [path] if path is not None else []

    def full(self, max_file_nbytes: int | None) -> tuple[LoadReport, list[Path]]:
        files = None
        if self.folder is not None:
            with held_back():
                from engine_loader import WholeFiles

            files = WholeFiles(self.folder, force=self.force)
        with self.connect() as registry, engine_log():
            records = registry.resolve(self.instances, self.wait_s)
            name = records[0].instance
            with held_back():
                from engine_loader import LoadOptions, MooncakeEngine, load_full
                from engine_loader.planning.whole import MAX_FILE_NBYTES

            with (
                MooncakeEngine(
                    self.host or registry.local_address(), self._protocol(records)
                ) as engine,
                files or nullcontext(),
                _bar(name, self.raise_again) as on_progress,
            ):
                report = load_full(
                    registry,
                    engine,
                    self.instances,
                    files=files,
                    max_file_nbytes=max_file_nbytes or MAX_FILE_NBYTES,
                    timeout_s=self.wait_s,
                    options=LoadOptions(
                        verify="digest" if self.verify else "header", progress=on_progress
                    ),
                )
        return report, files.paths if files is not None else []

    def _protocol(self, records: Sequence[RankRecord]) -> str:
        if self.protocol != AUTO:
            return self.protocol
        from engine_loader.engines.protocols import protocol_for

        return protocol_for(records)


@contextmanager
def _bar(name: str, also: Callable[[], None]) -> Iterator[Callable[[Progress], None]]:
    """`also` is called with every progress."""
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
        disable=not console.is_terminal or as_json(),
        transient=True,
    ) as bar:
        task = bar.add_task(name, total=None)

        def on_progress(progress: Progress) -> None:
            also()
            bar.update(task, completed=progress.nbytes, total=progress.total_nbytes)

        yield on_progress
