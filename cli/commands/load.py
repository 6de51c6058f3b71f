"""`engines load`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from cli.options import Seconds, engine_log, etcd_options, json_option, rank_option
from cli.output import print_json, size
from cli.signals import held_back
from registry import Registry
from registry.errors import InstanceIncomplete, InvalidField
from registry.record import GATEWAY, PROTOCOLS

if TYPE_CHECKING:
    from loader import Progress


@click.command("load")
@click.argument("instances", metavar="INSTANCE…", nargs=-1, required=True)
@rank_option(required=True, help="Which rank's weights to copy.")
@click.option("--out", type=click.Path(file_okay=False), help="Write them to DIR/rank-R.safetensors; without it, only copy.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
@click.option("--wait", type=Seconds(), default=60.0, show_default=True, metavar="S",
              help="How long to wait for all ranks of the instance.")  # fmt: skip
@click.option("--verify", is_flag=True, help="Compare every tensor with the digest that its source publishes.")
@click.option("--host", help="Address of this machine. Default: the one that etcd sees.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="tcp", show_default=True, help="How to read.")
@json_option
@etcd_options
def command(
    connect: Callable[[], Registry],
    instances: tuple[str, ...],
    rank: int,
    out: str | None,
    force: bool,
    wait: float,
    verify: bool,
    host: str | None,
    protocol: str,
    as_json: bool,
) -> None:
    """Copy the weights of one rank of INSTANCE from its memory into this process, and into a safetensors file.

    Of several instances all that are ready with the same version of the same model are read from at once; what one that is lost
    does not bring, the others do.
    """
    path = Path(out) / f"rank-{rank}.safetensors" if out else None
    if path is not None and path.exists() and not force:
        raise InvalidField(f"{path} is there already: choose another --out, or --force", field="out")
    with connect() as registry, engine_log():
        records = registry.resolve(instances, wait)
        if rank >= len(records):
            raise InvalidField(
                f"rank {rank} is not one of {records[0].instance!r}: its ranks are 0 to {len(records) - 1}", field="rank"
            )
        if records[rank].kept_by == GATEWAY:
            raise InstanceIncomplete(
                f"{records[rank].key} is an SGLang seed, which tells neither dtypes nor shapes and has no header to "
                f"check reads by: load it with SGLang, through `engines gateway`"
            )
        with held_back():
            from loader import MooncakeEngine, load
            from loader.files import allocate_like, write_weights

        tensors = allocate_like(registry.manifest(records[rank]))
        with (
            MooncakeEngine(host or registry.local_address(), protocol) as engine,
            _bar(f"{records[0].instance}/{rank}") as on_progress,
        ):
            report = load(
                registry,
                engine,
                instances,
                rank=rank,
                tensors=tensors,
                timeout_s=wait,
                verify="digest" if verify else "header",
                progress=on_progress,
            )
        if path is not None:
            write_weights(tensors, path)
    if as_json:
        print_json(
            {
                "instance": report.instance,
                "rank": report.rank,
                "version": report.version,
                "protocol": report.protocol,
                "tensors": report.tensors,
                "nbytes": report.nbytes,
                "reads": report.reads,
                "retries": report.retries,
                "seconds": round(report.seconds, 6),
                "transfer_s": round(report.transfer_s, 6),
                "digest_s": round(report.digest_s, 6),
                "sources": [
                    {"key": share.name, "nbytes": share.nbytes, "lost": str(share.error) if share.error else None}
                    for share in report.shares
                ],
                "file": str(path) if path else None,
            }
        )
        return
    click.echo(
        f"loaded {report.instance}/{rank} version {report.version}: {report.tensors:,} tensors, {size(report.nbytes)} in "
        f"{report.seconds:.2f} s ({report.gb_per_s:.2f} GB/s over {report.protocol}){f' → {path}' if path else ''}"
    )


@contextmanager
def _bar(name: str) -> Iterator[Callable[[Progress], None]]:
    console = Console(file=sys.stderr)
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda progress: bar.update(task, completed=progress.nbytes, total=progress.total_nbytes)
