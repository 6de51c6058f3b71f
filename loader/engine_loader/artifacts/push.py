"""`publish_artifact`: a folder becomes readable for peers that have the same key."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from engine_loader.artifacts.key import LABEL, TENSOR, ArtifactName
from engine_loader.artifacts.packing import pack
from engine_loader.engines.base import Engine
from engine_loader.options import PublishOptions
from engine_loader.publishing.publication import Publication
from engine_loader.publishing.publish import publish
from engine_loader.tensors.shards import Shard
from engine_registry import Registry


def publish_artifact(
    registry: Registry,
    engine: Engine,
    name: str,
    folder: str | os.PathLike[str],
    key: Mapping[str, str],
    *,
    only: Collection[str] | None = None,
    instance: str | None = None,
    options: PublishOptions = PublishOptions(),
) -> Publication:
    """Offers the files of a folder, such as a compile cache, to peers.

    The folder is read once, into memory, and is not looked at again. Times, owners and folders
    without files are left out: folders with the same files give the same bytes, and peers read
    from all that offer them. Others may write in the folder meanwhile.

    It is an instance with the model `artifact/NAME@DIGEST`, where DIGEST is that of the key, and
    with the label `artifact`, whose value is the name.

    Args:
        registry: Where it is registered.
        engine: Serves the memory.
        name: The name of the artifact: 1 to 63 of the characters A-Z a-z 0-9 . _ -, with a letter
            or digit at each end.
        folder: The folder.
        key: What decides whether the files can be used, by name: at most 32 printable texts. Peers
            find what has exactly the same key. `artifact_key_here` has the fields that this machine
            decides.
        only: Paths in the folder, of files or folders, to which it is limited. None takes all.
        instance: The name of the instance. None makes one that no other has.
        options: How to publish; see PublishOptions. There are always digests.

    Returns:
        The publication, which the caller closes.

    Raises:
        ArtifactInvalid: The folder cannot be read, has no files, or has links or too much.
        InvalidField: An argument is not valid; `details["field"]` names it.
        LoaderError: What `publish` raises.
        RegistryError: What `publish` raises.
    """
    artifact = ArtifactName(name, key)
    archive = pack(Path(folder), only)
    return publish(
        registry,
        engine,
        instance=instance or f"{LABEL}.{name}.{uuid.uuid4().hex[:8]}",
        rank=0,
        world_size=1,
        tensors={TENSOR: archive},
        model=artifact.model,
        shards={TENSOR: Shard(tuple(archive.shape), (0,))},
        options=replace(options, digests=True, labels={**(options.labels or {}), LABEL: name}),
    )
