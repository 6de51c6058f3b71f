"""`engines load`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import click

from engine_cli.completion import complete_instances
from engine_cli.connection import Connect, etcd_options
from engine_cli.devices import check_device, device_option
from engine_cli.logs import log_options
from engine_cli.options import (
    Seconds,
    host_option,
    json_option,
    label_option,
    location_option,
    nbytes_of,
    rank_option,
)
from engine_cli.render.documents import loaded_json
from engine_cli.render.tables import print_json, size
from engine_cli.render.texts import registration
from engine_cli.runtime.loading import AUTO, Loading, protocol_option
from engine_cli.runtime.metrics import metrics_options
from engine_cli.runtime.serving import Endings, drain_option
from engine_cli.signals import raised
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import ENGINES, check_instance
from engine_registry.schema.printable import count


@click.command("load")
@click.argument(
    "instances",
    metavar="INSTANCE…",
    nargs=-1,
    required=True,
    shell_complete=complete_instances,
)
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
    "index; also how much memory is taken. At least 1 byte. Default: 5GB.",
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
@label_option("With --serve: a label of that instance, which has none of its source.")
@drain_option
@click.option(
    "--until-eof",
    is_flag=True,
    help="With --serve: also end when standard input closes, as when a parent process dies.",
)
@click.option(
    "--verify", is_flag=True, help="Compare every tensor with the digest that its source publishes."
)
@click.option(
    "--reuse",
    is_flag=True,
    help="With --rank, --out and --force: do not read again what the file there holds already.",
)
@click.option(
    "--also-from",
    multiple=True,
    metavar="INSTANCE",
    shell_complete=complete_instances,
    help="Blocks that this instance holds as well may come from it: it serves the base model, or "
    "another version. May be given several times.",
)
@host_option("Address of this machine.")
@protocol_option(
    "How to read; auto: the quickest way that the source is served over and this machine has, "
    "and with --device rdma."
)
@device_option
@location_option
@json_option
@metrics_options
@log_options
@etcd_options
def command(
    connect: Connect,
    serve_metrics: Callable[[], AbstractContextManager[None]],
    instances: tuple[str, ...],
    rank: int | None,
    full: bool,
    out: str | None,
    force: bool,
    max_file_nbytes: int | None,
    wait: float,
    replica: str | None,
    labels: dict[str, str],
    drain: float,
    until_eof: bool,
    verify: bool,
    reuse: bool,
    also_from: tuple[str, ...],
    host: str | None,
    protocol: str,
    device: str,
    location: str,
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
            "--rank and --full exclude each other",
            "say --rank for one rank, or --full for all as whole tensors",
            field="rank",
        )
    if max_file_nbytes is not None and not full:
        raise InvalidField(
            "--max-shard-size goes with --full, as one rank is one file",
            "leave it out, or say --full",
            field="max_shard_size",
        )
    if device and protocol == AUTO:
        protocol = "rdma"
    check_device(device, protocol)
    if replica is not None:
        check_instance(replica)
    if replica is not None and full:
        raise InvalidField(
            "--serve goes with --rank, as one rank is served as it is at its source",
            "leave --full out, or --serve",
            field="serve",
        )
    if labels and replica is None:
        raise InvalidField(
            "--label goes with --serve, as only what is served has labels",
            "leave it out, or say --serve NAME",
            field="labels",
        )
    if until_eof and replica is None:
        raise InvalidField(
            "--until-eof goes with --serve, as a load ends by itself",
            "leave it out, or say --serve",
            field="until_eof",
        )
    _check_reuse(reuse, rank is not None and out is not None and force)
    endings = Endings()
    with ExitStack() as stack:
        stack.enter_context(serve_metrics())
        with raised() as raise_again:
            loading = Loading(
                connect,
                instances,
                Path(out) if out else None,
                force,
                wait,
                verify,
                reuse,
                also_from,
                host,
                protocol,
                device,
                location,
                raise_again,
                stack,
            )
            if full:
                report, paths = loading.full(max_file_nbytes)
            elif rank is not None:
                report, paths = loading.rank(rank, replica, labels, endings)
            else:
                raise InvalidField(
                    "nothing says what to copy",
                    "say --rank R for one rank, or --full for all as whole tensors",
                    field="rank",
                )
        if as_json:
            print_json(loaded_json(report, paths))
        else:
            name = report.instance if full else f"{report.instance}/{rank}"
            click.echo(
                f"loaded {name} version {report.version}: {count(report.tensors, 'tensor')}, "
                f"{size(report.nbytes)} in {report.seconds:.2f} s ({report.gb_per_s:.2f} GB/s over "
                f"{report.protocol}{registration(report.register_s)})"
                f"{_skipped(report.skipped_nbytes)}{_lent(report.lent)}{_where(paths)}"
            )
        if report.publication is not None:
            endings.listen(until_eof)
            record = report.publication.record
            click.echo(
                f"serving {record.instance}/{record.rank} at {record.session_id}; Ctrl-C withdraws",
                err=as_json,
            )
            endings.hold(report.publication, drain)
            report.publication.close()
            endings.say(report.publication, err=as_json)


def _check_reuse(reuse: bool, replaces: bool) -> None:
    if reuse and not replaces:
        raise InvalidField(
            "--reuse goes with --rank, --out and --force, as it is about the file that is replaced",
            "leave it out, or say these as well",
            field="reuse",
        )


def _skipped(nbytes: int) -> str:
    return f"; {size(nbytes)} were there already" if nbytes else ""


def _lent(lent: Mapping[str, int]) -> str:
    names = " and ".join(key.removeprefix(ENGINES) for key in sorted(lent))
    return f"; {size(sum(lent.values()))} came from {names}" if lent else ""


def _where(paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    named = f" and {count(len(paths) - 1, 'file')} that it names" if len(paths) > 1 else ""
    return f" → {paths[-1]}{named}"
