"""`engines show`."""

from __future__ import annotations

from collections.abc import Callable

import click

from cli.options import etcd_options, instance_argument, json_option, rank_option
from cli.output import (
    RANK_COLUMNS,
    TENSOR_COLUMNS,
    instance_json,
    print_json,
    print_table,
    rank_json,
    rank_row,
    size,
    tensor_rows,
    tensors_json,
)
from cli.text import printable
from registry import InstanceState, InstanceStatus, RankRecord, Registry
from registry.errors import InstanceIncomplete, InstanceNotFound


@click.command("show")
@instance_argument
@rank_option(required=False, help="This rank only.")
@click.option("--tensors", "with_tensors", is_flag=True, help="Every tensor of every rank shown.")
@json_option
@etcd_options
def command(connect: Callable[[], Registry], instance: str, rank: int | None, with_tensors: bool, as_json: bool) -> None:
    """One instance: its state, its ranks and where they are."""
    with connect() as registry:
        for damage in registry.damaged(instance, rank) if rank is not None else ():
            raise damage
        status = registry.instance(instance)
        records = chosen(status, rank)
        manifests = [registry.manifest(record) if with_tensors else None for record in records]
    shown = list(zip(records, manifests, strict=True))
    if as_json:
        ranks = [rank_json(record) | ({"entries": tensors_json(manifest)} if manifest else {}) for record, manifest in shown]
        print_json({**instance_json(status), "ranks": ranks})
        return
    click.echo(f"{instance}: {status.state.value}, {size(status.nbytes)}, model {status.model or '-'}")
    if status.summary:
        click.echo(f"not ready: {printable(status.summary)}")
    print_table(RANK_COLUMNS, [rank_row(record) for record in records])
    for record, manifest in shown:
        if manifest:
            click.echo(f"rank {record.rank}:")
            print_table(TENSOR_COLUMNS, tensor_rows(manifest))


def chosen(status: InstanceStatus, rank: int | None) -> list[RankRecord]:
    """The records of the rank, or of all; raises what is missing."""
    if status.state is InstanceState.GONE:
        raise InstanceNotFound(f"instance {status.instance!r} is not registered: see `engines list`")
    records = [record for record in status.records if rank is None or record.rank == rank]
    if rank is not None and not records:
        raise InstanceIncomplete(f"rank {rank} of {status.instance!r} is not registered: see `engines show {status.instance}`")
    return records
