"""`engines register`.

Longer than other modules: half of it is the options.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import click

from engine_cli.completion import instance_argument
from engine_cli.connection import Connect, etcd_options
from engine_cli.devices import check_device, device_option
from engine_cli.logs import as_json, log_options
from engine_cli.options import (
    HOLD,
    TTL,
    UNRESPONSIVE_AFTER,
    WORLD_SIZE,
    engine_log,
    host_option,
    label_option,
    location_option,
    rank_option,
)
from engine_cli.render.tables import size
from engine_cli.render.texts import origin, registration
from engine_cli.runtime.metrics import metrics_options
from engine_cli.runtime.serving import Endings, drain_option
from engine_cli.shards import boxes_of, parse_cut, parse_place, read_boxes
from engine_cli.signals import held_back, raised
from engine_registry import ModelIdentity
from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance, check_rank
from engine_registry.schema.numbers import UNRESPONSIVE_AFTER_S
from engine_registry.schema.printable import count
from engine_registry.schema.record import MAX_VERSION, PROTOCOLS


@click.command("register")
@instance_argument
@rank_option(required=True, help="World rank of this process, from 0.")
@click.option(
    "--world-size",
    type=WORLD_SIZE,
    required=True,
    help="Ranks of the instance, over all parallel axes.",
)
@click.option(
    "--weights",
    "paths",
    type=click.Path(),
    multiple=True,
    required=True,
    metavar="FILE_OR_DIR",
    help="Safetensors file, index, or folder of them; may be given several times.",
)
@click.option(
    "--from-peers",
    is_flag=True,
    help="If this rank of --model runs somewhere, copy its weights from there instead of "
    "reading the files; of many that start at once, one reads them. If it died here and its "
    "weights are held, take them over.",
)
@host_option("Address of this machine that loaders can reach.")
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default="tcp",
    show_default=True,
    help="How loaders read.",
)
@device_option
@click.option("--model", help="Model name. Default: the instance's name.")
@click.option("--revision", default="", help="Model revision.")
@click.option(
    "--version",
    type=click.IntRange(0, MAX_VERSION - 1),
    default=0,
    show_default=True,
    help="Version of the weights.",
)
@location_option
@label_option("A label, by which people find the instance; all of its ranks have the same.")
@click.option("--generation", help="Id of this launch; ranks of different launches do not mix.")
@click.option(
    "--topology",
    multiple=True,
    metavar="AXIS=INDEX/SIZE",
    help="Place on a parallel axis, such as tp=0/2.",
)
@click.option(
    "--shard",
    "cuts",
    multiple=True,
    metavar="PATTERN:DIM[:AXIS]",
    help="Tensors of these names, as in '*.q_proj.weight:0', are equal slices of whole "
    "ones along this dimension, cut over this axis of --topology; without AXIS over "
    "tp, or over all ranks where there is no tp. All others are whole. May be given "
    "several times.",
)
@click.option(
    "--shards",
    "boxes_path",
    type=click.Path(),
    metavar="FILE",
    help="Which part of the whole each tensor is, where slices are uneven: JSON, "
    '{"TENSOR": {"global_shape": [8, 16], "offsets": [4, 0]}}. All others are whole.',
)
@click.option(
    "--whole",
    is_flag=True,
    help="Tensors that --shard and --shards do not name are whole. Without any of the "
    "three, all only load as this rank.",
)
@click.option(
    "--ttl",
    type=TTL,
    default=10.0,
    show_default=True,
    metavar="S",
    help="How long the rank stays listed after its whole host is lost.",
)
@click.option(
    "--unresponsive-after",
    type=UNRESPONSIVE_AFTER,
    default=UNRESPONSIVE_AFTER_S,
    show_default=True,
    metavar="S",
    help="How long this process may be stopped, or not answer, before it is listed so.",
)
@click.option(
    "--hold",
    type=HOLD,
    default=0.0,
    show_default=True,
    metavar="S",
    help="How long the weights stay in memory after this process has died, for a process that is "
    "started in its place with --from-peers.",
)
@drain_option
@click.option(
    "--until-eof",
    is_flag=True,
    help="Also end when standard input closes, as when a parent process dies.",
)
@metrics_options
@log_options
@etcd_options
def command(
    connect: Connect,
    serve_metrics: Callable[[], AbstractContextManager[None]],
    instance: str,
    rank: int,
    world_size: int,
    paths: tuple[str, ...],
    from_peers: bool,
    host: str | None,
    protocol: str,
    device: str,
    model: str | None,
    revision: str,
    version: int,
    location: str,
    labels: dict[str, str],
    generation: str | None,
    topology: tuple[str, ...],
    cuts: tuple[str, ...],
    boxes_path: str | None,
    whole: bool,
    ttl: float,
    unresponsive_after: float,
    hold: float,
    drain: float,
    until_eof: bool,
) -> None:
    """Serve safetensors files from memory as one rank of INSTANCE, until Ctrl-C or SIGTERM; then
    drain and withdraw.

    Over socket, peers cannot write. They need the token of ENGINES_SOCKET_TOKEN_FILE, and
    certificates if ENGINES_SOCKET_CERT, ENGINES_SOCKET_KEY and ENGINES_SOCKET_CACERT name some;
    without both, every peer that reaches this machine may read. Over the other protocols, every
    such peer may read and write the weights: use them on trusted networks only.
    """
    check_instance(instance)
    check_rank(rank, world_size)
    check_device(device, protocol)
    if from_peers and model is None:
        raise InvalidField(
            "--from-peers needs --model, by which running ranks are found: add --model NAME",
            field="model",
        )
    places = dict(map(parse_place, topology))
    slices = [parse_cut(text, places, rank, world_size) for text in cuts]
    listed = read_boxes(Path(boxes_path)) if boxes_path is not None else {}
    with serve_metrics(), connect() as registry, engine_log():
        with held_back():
            from engine_loader import (
                LoadOptions,
                PublishOptions,
                Shard,
                load_or_seed,
                open_engine,
            )
            from engine_loader.files.folder import files_of
            from engine_loader.files.memory import memory_for
            from engine_loader.files.stored import Files
            from engine_loader.loading.progress_bar import progress_bar
            from engine_loader.starting.from_files import publish_files

        files = Files(files_of(paths, rank))
        tensors = memory_for(files, in_arenas=hold > 0)
        boxes = boxes_of(
            {name: tuple(tensor.shape) for name, tensor in tensors.items()},
            slices,
            listed,
            whole=whole,
        )
        identity = ModelIdentity(model or instance, revision)
        endings = Endings()
        where: dict[str, Any] = {
            "instance": instance,
            "rank": rank,
            "world_size": world_size,
            "shards": {name: Shard(*box) for name, box in boxes.items()},
            "topology": places,
        }
        options = PublishOptions(
            generation=generation,
            version=version,
            labels=labels,
            digests=True,
            ttl_s=ttl,
            unresponsive_after_s=unresponsive_after,
            hold_s=hold,
            on_state=endings.on_state,
        )
        with ExitStack() as stack:
            engine = stack.enter_context(
                open_engine(host or registry.local_address(), protocol, device, location=location)
            )
            seeded = publication = None
            name = f"{instance}/{rank}"
            with (
                raised() as raise_again,
                progress_bar(name, lambda _: raise_again(), not as_json()) as on_progress,
            ):
                if from_peers:
                    seeded = stack.enter_context(
                        load_or_seed(
                            registry,
                            engine,
                            identity,
                            tensors,
                            **where,
                            fallback=paths,
                            required=True,  # a rank that nobody can find serves nobody
                            load=LoadOptions(progress=on_progress),
                            publish=options,
                        )
                    )
                    publication = seeded.publication
                if publication is None:
                    publication = stack.enter_context(
                        publish_files(
                            registry,
                            engine,
                            files,
                            tensors,
                            **where,
                            model=identity,
                            options=options,
                            progress=on_progress,
                        )
                    )
            endings.listen(until_eof)
            record = publication.record
            click.echo(
                f"registered {name} of {world_size}: "
                f"{count(record.manifest.tensors, 'tensor')}, {size(record.manifest.nbytes)}, "
                f"at {record.session_id} "
                f"({record.protocol}{registration(publication.register_s)}){origin(seeded)}; "
                "Ctrl-C withdraws"
            )
            endings.hold(publication, drain)
        endings.say(publication)
