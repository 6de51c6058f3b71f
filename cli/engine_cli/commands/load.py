"""`engines load`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from engine_cli.logs import as_json, log_options
from engine_cli.options import (
    Seconds,
    engine_log,
    etcd_options,
    host_option,
    json_option,
    nbytes_of,
    rank_option,
)
from engine_cli.render.tables import print_json, size
from engine_cli.runtime.serving import Endings, drain_option
from engine_cli.signals import held_back, raised
from engine_registry import RankRecord, Registry
from engine_registry.errors import InstanceIncomplete, InvalidField
from engine_registry.schema.keys import check_instance
from engine_registry.schema.record import GATEWAY, PROTOCOLS

if TYPE_CHECKING:
    from engine_loader import LoadReport, Progress

AUTO = "auto"


@click.command("load")
@click.argument("instances", metavar="INSTANCE…", nargs=-1, required=True)
@rank_option(required=False, help="Which rank's weights to copy, as they are there.")
@click.option(
    "--full", is_flag=True, help="Copy the weights of all ranks, put together to whole tensors."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False),
    help="Write them to DIR/rank-R.safetensors, or with --full to DIR/model.safetensors or "
    "its parts; without it, only copy.",
)
@click.option("--force", is_flag=True, help="Overwrite what is there already.")
@click.option(
    "--max-shard-size",
    "max_file_nbytes",
    type=nbytes_of,
    metavar="SIZE",
    help="With --full: size of a file, such as 500MB, above which there are several and an "
    "index; also how much memory is taken. Default: 5GB.",
)
@click.option(
    "--wait",
    type=Seconds(),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long to wait for all ranks of the instance.",
)
@click.option(
    "--serve",
    "replica",
    metavar="NAME",
    help="With --rank: serve the weights from here as well, as the same rank of an "
    "instance of this name, from the first that have come on, until Ctrl-C or "
    "SIGTERM. Ranks that load so at the same time load from each other.",
)
@drain_option
@click.option(
    "--verify", is_flag=True, help="Compare every tensor with the digest that its source publishes."
)
@host_option("Address of this machine.")
@click.option(
    "--protocol",
    type=click.Choice((AUTO, *PROTOCOLS)),
    default=AUTO,
    show_default=True,
    help=(
        "How to read; auto: the quickest way that the source is served over and this machine has."
    ),
)
@json_option
@log_options
@etcd_options
def command(
    connect: Callable[[], Registry],
    instances: tuple[str, ...],
    rank: int | None,
    full: bool,
    out: str | None,
    force: bool,
    max_file_nbytes: int | None,
    wait: float,
    replica: str | None,
    drain: float,
    verify: bool,
    host: str | None,
    protocol: str,
    as_json: bool,
) -> None:
    """Copy the weights of INSTANCE from its memory into this process, and into safetensors files:
    those of one rank as they are there, or with --full those of all ranks as whole tensors, in
    files as Hugging Face has them.

    Of several instances all that are ready with the same content of the same model are read from at
    once; what one that is lost does not bring, the others do.
    """
    if full and rank is not None:
        raise InvalidField(
            "--rank and --full exclude each other: --rank copies one rank, --full all as "
            "whole tensors",
            field="rank",
        )
    if max_file_nbytes is not None and not full:
        raise InvalidField(
            "--max-shard-size goes with --full: one rank is one file", field="max_shard_size"
        )
    if replica is not None:
        check_instance(replica)
    if replica is not None and full:
        raise InvalidField(
            "--serve goes with --rank: what is served is one rank as it is at its source",
            field="serve",
        )
    endings = Endings()
    with ExitStack() as stack:
        with raised() as raise_again:
            loading = _Loading(
                connect,
                instances,
                Path(out) if out else None,
                force,
                wait,
                verify,
                host,
                protocol,
                raise_again,
                stack,
            )
            if full:
                report, paths = loading.full(max_file_nbytes)
            elif rank is not None:
                report, paths = loading.rank(rank, replica, endings)
            else:
                raise InvalidField(
                    "say what to copy: --rank R for one rank, or --full for all as whole tensors",
                    field="rank",
                )
        if as_json:
            print_json(_json(report, paths))
        else:
            name = report.instance if full else f"{report.instance}/{rank}"
            click.echo(
                f"loaded {name} version {report.version}: {report.tensors:,} tensors, "
                f"{size(report.nbytes)} in "
                f"{report.seconds:.2f} s ({report.gb_per_s:.2f} GB/s over "
                f"{report.protocol}){_where(paths)}"
            )
        if report.publication is not None:
            endings.listen()
            record = report.publication.record
            click.echo(
                f"serving {record.instance}/{record.rank} at {record.session_id}; Ctrl-C withdraws",
                err=as_json,
            )
            endings.hold(report.publication, drain)
            report.publication.close()
            endings.tell(report.publication, err=as_json)


@dataclass
class _Loading:
    """What is loaded from where. What it writes it also returns, beside the report."""

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
        """With `replica`, from whoever has these weights, and they are served under that name."""
        path = self.folder / f"rank-{rank}.safetensors" if self.folder else None
        if path is not None and path.exists() and not self.force:
            raise InvalidField(
                f"{path} is there already: choose another --out, or --force", field="out"
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
                f"{record.key} is an SGLang seed, which tells neither dtypes nor shapes and "
                "has no header to "
                "check reads by: load it with SGLang, through `engines gateway`"
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


def _where(paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    return (
        " → "
        f"{paths[-1]}{f' and the {len(paths) - 1} files that it names' if len(paths) > 1 else ''}"
    )


def _json(report: LoadReport, paths: Sequence[Path]) -> dict[str, object]:
    return {
        "instance": report.instance,
        "rank": report.rank,
        "version": report.version,
        "content": report.content,
        "protocol": report.protocol,
        "tensors": report.tensors,
        "nbytes": report.nbytes,
        "read_nbytes": report.read_nbytes,
        "reads": report.reads,
        "retries": report.retries,
        "seconds": round(report.seconds, 6),
        "transfer_s": round(report.transfer_s, 6),
        "digest_s": round(report.digest_s, 6),
        "sources": [
            {
                "key": share.name,
                "nbytes": share.nbytes,
                "lost": str(share.error) if share.error else None,
            }
            for share in report.shares
        ],
        "file": str(paths[0]) if len(paths) == 1 else None,
        "files": list(map(str, paths)),
    }


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
