"""`engines show`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.options import json_option, rank_option
from engine_cli.render.documents import (
    instance_json,
    loading_json,
    progress_json,
    pull_json,
    rank_json,
    release_json,
    tensors_json,
)
from engine_cli.render.flows import Flows
from engine_cli.render.printable import printable
from engine_cli.render.tables import print_json, print_table, print_tree, size
from engine_cli.render.texts import (
    FLOW_COLUMNS,
    TENSOR_COLUMNS,
    instance_state,
    rank_table,
    read_by,
    reads_from,
    tensor_rows,
    tree_rows,
    why_not_ready,
)
from engine_cli.wording import said
from engine_registry import InstanceState, InstanceStatus, RankRecord, Registry, Release
from engine_registry.errors import EtcdRefused, InstanceIncomplete, InstanceNotFound
from engine_registry.schema.labels import labels_text


@click.command("show")
@instance_argument
@rank_option(required=False, help="This rank only.")
@click.option("--tensors", "with_tensors", is_flag=True, help="Every tensor of every rank shown.")
@json_option
@etcd_options
def command(
    connect: Connect,
    instance: str,
    rank: int | None,
    with_tensors: bool,
    as_json: bool,
) -> None:
    """One instance: its state, its ranks and where they are, whom they read from and who reads from
    them, and the same of all instances of its model as a tree.
    """
    with connect() as registry:
        for damage in registry.damaged(instance, rank) if rank is not None else ():
            raise damage
        status = registry.instance(instance)
        records = chosen(status, rank)
        manifests = [registry.manifest(record) if with_tensors else None for record in records]
        flows, unseen = _flows(registry, status)
        release = _release(registry, instance)
    shown = list(zip(records, manifests, strict=True))
    if as_json:
        known = None if unseen else flows
        ranks = [
            {
                **_rank_json(record, known),
                **({"entries": tensors_json(manifest)} if manifest else {}),
            }
            for record, manifest in shown
        ]
        pulls = [pull_json(pull) for pull in flows.pulls]
        loading = loading_json(status, flows)
        print_json(
            {
                **instance_json(status),
                "released": release and release_json(release),
                "loading": loading,
                "pulls": None if unseen else pulls,
                "ranks": ranks,
            }
        )
        return
    state = instance_state(status, flows.loaded(status))
    click.echo(
        f"{instance}: {state}, {size(status.nbytes)}, model {printable(str(status.model or '-'))}"
    )
    if status.labels:
        click.echo(f"labels: {labels_text(status.labels)}")
    if release is not None:
        at, by = release.released_at, printable(release.by)
        click.echo(f"released: version {release.version}, at {printable(at)}, by {by}")
    if why := why_not_ready(status):
        click.echo(f"{'not ready:' if status.summary else 'ready, but'} {printable(why)}")
    _print_ranks(records, flows)
    tree = flows.tree() if rank is None else flows.trees_with(records)
    if tree:
        click.echo("who reads from whom:")
        print_tree(tree_rows(tree))
    if unseen:
        click.echo(f"who reads from whom is not known: {printable(unseen)}")
    for record, manifest in shown:
        if manifest:
            click.echo(f"rank {record.rank}:")
            print_table(TENSOR_COLUMNS, tensor_rows(manifest))


def _flows(registry: Registry, status: InstanceStatus) -> tuple[Flows, str]:
    """Of all instances of the model, and why nothing is known of them, if etcd refuses."""
    try:
        pulls = registry.all_pulls()
    except EtcdRefused as exc:
        return Flows(status.records, ()), said(exc)
    records = status.records
    if pulls:
        with suppress(EtcdRefused):  # a rank's own user may not see other instances
            records = tuple(record for each in registry.instances() for record in each.records)
    flows = Flows(records, pulls)
    return (flows.of_model(status.model) if status.model else flows), ""


def _release(registry: Registry, instance: str) -> Release | None:
    """None also where etcd does not let this user see releases."""
    with suppress(EtcdRefused):
        return registry.released(instance)
    return None


def _rank_json(record: RankRecord, flows: Flows | None) -> dict[str, Any]:
    """What tickets state is null where they may not be seen."""
    return {
        **rank_json(record),
        "progress": flows and progress_json(flows.progress(record)),
        "reads_from": flows and [pull_json(pull) for pull in flows.reads(record)],
        "readers": flows and [pull_json(pull) for pull in flows.readers(record)],
    }


def _print_ranks(records: Sequence[RankRecord], flows: Flows) -> None:
    columns, rows = rank_table([(record, flows.progress(record)) for record in records])
    if not flows.pulls:
        print_table(columns, rows)
        return
    more = [[reads_from(flows.reads(record)), read_by(flows.readers(record))] for record in records]
    print_table(
        (*columns, *FLOW_COLUMNS), [[*row, *two] for row, two in zip(rows, more, strict=True)]
    )


def chosen(status: InstanceStatus, rank: int | None) -> list[RankRecord]:
    """The records of the rank, or of all, also of those that are held; raises what is missing."""
    if status.state is InstanceState.GONE and not status.held:
        raise InstanceNotFound(
            f"instance {status.instance!r} is not registered",
            "see `Registry.instances()`",
            instances=[status.instance],
        )
    known = sorted([*status.records, *status.held], key=lambda record: record.rank)
    records = [record for record in known if rank is None or record.rank == rank]
    if rank is not None and not records:
        raise InstanceIncomplete(
            f"rank {rank} of {status.instance!r} is not registered: see `engines show "
            f"{status.instance}`"
        )
    return records
