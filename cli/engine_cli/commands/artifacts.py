"""`engines artifacts`: push, pull and list."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import click

from engine_cli.connection import Connect, etcd_options
from engine_cli.devices import check_device, device_option
from engine_cli.logs import as_json as logs_json
from engine_cli.logs import log_options
from engine_cli.options import (
    Seconds,
    debug_option,
    engine_log,
    host_option,
    json_option,
    label_option,
    location_option,
    pairs_of,
)
from engine_cli.render.artifacts import (
    artifact_table,
    listed_json,
    pulled_json,
    pulled_text,
    why_none,
)
from engine_cli.render.tables import print_json, print_table, size
from engine_cli.runtime.loading import AUTO, protocol_of, protocol_option
from engine_cli.runtime.serving import Endings, drain_option
from engine_cli.signals import held_back, raised
from engine_loader.artifacts.held import held_in
from engine_loader.artifacts.key import LABEL, ArtifactName
from engine_registry.errors import InstanceNotFound
from engine_registry.schema.keys import check_instance
from engine_registry.schema.record import PROTOCOLS, WITHIN_HOST

Command = TypeVar("Command", bound=Callable[..., object])


@click.group("artifacts")
@debug_option
def command() -> None:
    """Compile caches and other folders that engines copy from each other, beside their weights.

    An artifact has a name and a key. The key says what its files depend on, such as the versions of
    torch and triton and the device. Only what has exactly the same key is pulled.
    """


def _fields(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Of NAME=VALUE, as often as it is given."""
    return pairs_of(values, "NAME=VALUE, such as torch=2.13.0")


def _key_options(help: str) -> Callable[[Command], Command]:
    """The key, as `fields` and `here`."""

    def add(command: Command) -> Command:
        command = click.option(
            "--here",
            is_flag=True,
            help="Add the fields that this machine and environment decide: python, torch, triton, "
            "platform, cpu, device; on a GPU cuda and driver.",
        )(command)
        return click.option(
            "--field",
            "fields",
            multiple=True,
            metavar="NAME=VALUE",
            callback=_fields,
            help=f"{help} May be given several times.",
        )(command)

    return add


def _key_of(fields: dict[str, str], here: bool) -> dict[str, str]:
    if not here:
        return fields
    with held_back():
        from engine_loader import artifact_key_here

    return artifact_key_here() | fields


@command.command("push")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@_key_options("A field of the key, such as torch=2.13.0.")
@click.option("--instance", help="Name of the instance. Default: one that no other has.")
@host_option("Address of this machine that peers can reach.")
@click.option(
    "--protocol",
    type=click.Choice([name for name in PROTOCOLS if name not in WITHIN_HOST]),
    default="tcp",
    show_default=True,
    help="How peers read.",
)
@device_option
@location_option
@label_option("A label, by which people find the instance. It also gets artifact=NAME.")
@drain_option
@click.option(
    "--until-eof",
    is_flag=True,
    help="Also end when standard input closes, as when a parent process dies.",
)
@log_options
@etcd_options
def push(
    connect: Connect,
    name: str,
    folder: Path,
    fields: dict[str, str],
    here: bool,
    instance: str | None,
    host: str | None,
    protocol: str,
    device: str,
    location: str,
    labels: dict[str, str],
    drain: float,
    until_eof: bool,
) -> None:
    """Offer the files of FOLDER from memory as the artifact NAME, until Ctrl-C or SIGTERM.

    FOLDER is read once. It may hold files and folders; links are refused. The transfer engine lets
    every peer that reaches it read and write that memory: use it on trusted networks only.
    """
    if instance is not None:
        check_instance(instance)
    check_device(device, protocol)
    artifact = ArtifactName(name, _key_of(fields, here))
    with connect() as registry, engine_log():
        with held_back():
            from engine_loader import PublishOptions, open_engine, publish_artifact

        endings = Endings()
        with ExitStack() as stack:
            with raised():
                engine = stack.enter_context(
                    open_engine(
                        host or registry.local_address(), protocol, device, location=location
                    )
                )
                publication = stack.enter_context(
                    publish_artifact(
                        registry,
                        engine,
                        name,
                        folder,
                        artifact.key,
                        instance=instance,
                        options=PublishOptions(labels=labels, on_state=endings.on_state),
                    )
                )
            endings.listen(until_eof)
            record = publication.record
            click.echo(
                f"offers {artifact}: {size(record.manifest.nbytes)}, as {record.instance} at "
                f"{record.session_id} ({record.protocol}); Ctrl-C withdraws"
            )
            endings.hold(publication, drain)
        endings.say(publication)


@command.command("pull")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@_key_options("A field of the key, such as torch=2.13.0.")
@click.option(
    "--max-time",
    type=Seconds(min_open=True),
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long it may take; then it fails.",
)
@host_option("Address of this machine.")
@protocol_option("How to read; auto: the quickest way that is offered and this machine has.")
@device_option
@location_option
@json_option
@log_options
@etcd_options
def pull(
    connect: Connect,
    name: str,
    folder: Path,
    fields: dict[str, str],
    here: bool,
    max_time: float,
    host: str | None,
    protocol: str,
    device: str,
    location: str,
    as_json: bool,
) -> None:
    """Copy the files of the artifact NAME from peers into FOLDER, which others may use meanwhile.

    All bytes are proven by digests before a file is written. Files that are there already stay as
    they are. Where no peer offers the artifact with this key, the exit code is 4.
    """
    if device and protocol == AUTO:
        protocol = "rdma"
    check_device(device, protocol)
    artifact, began = ArtifactName(name, _key_of(fields, here)), time.monotonic()
    with connect() as registry, engine_log(), raised() as raise_again:
        held = held_in(registry.instances(LABEL))
        records = [record for each in held if each.name == artifact for record in each.records]
        if not records:
            raise InstanceNotFound(*why_none(artifact, held))
        with held_back():
            from engine_loader import LoadOptions, open_engine, pull_artifact
            from engine_loader.loading.progress_bar import progress_bar

        with (
            open_engine(
                host or registry.local_address(),
                protocol_of(protocol, records),
                device,
                location=location,
            ) as engine,
            progress_bar(str(artifact), lambda _: raise_again(), not logs_json()) as on_progress,
        ):
            report = pull_artifact(
                registry,
                engine,
                name,
                folder,
                artifact.key,
                timeout_s=max(0.0, max_time - (time.monotonic() - began)),
                options=LoadOptions(progress=on_progress),
            )
        if report is None:
            raise InstanceNotFound(*why_none(artifact, ()))
    if as_json:
        print_json(pulled_json(report, folder))
    else:
        click.echo(pulled_text(report, folder))


@command.command("list")
@click.argument("name", required=False)
@_key_options("Only those whose key has this field with this value.")
@json_option
@log_options
@etcd_options
def list_artifacts(
    connect: Connect, name: str | None, fields: dict[str, str], here: bool, as_json: bool
) -> None:
    """All artifacts, or those of this NAME, with their keys and how many instances offer them."""
    wanted = _key_of(fields, here)
    with connect() as registry:
        found = registry.instances(LABEL)
    held = [
        each
        for each in held_in(found)
        if name in (None, each.name.name) and wanted.items() <= each.name.key.items()
    ]
    if as_json:
        print_json({"artifacts": list(map(listed_json, held))})
    elif held:
        print_table(*artifact_table(held))
    else:
        click.echo("no artifact matches" if found else "no artifact is offered")
