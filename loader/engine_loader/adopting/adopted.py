"""`Adopted`: weights that this process has of a rank whose process has ended, or shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from engine_loader.adopting.finding import HeldRank
from engine_loader.adopting.memory import OpenedRank
from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.options import PublishOptions
from engine_loader.publishing.header import Header
from engine_loader.publishing.opening import open_publication
from engine_loader.publishing.publication import Publication
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.shards import is_sharded, shard_of
from engine_loader.tensors.state_dict import decode_value
from engine_registry import Manifest, RankRecord, Registry, TensorEntry
from engine_registry.lifetime import Closable


class Adopted(Closable):
    """What `adopt` has found, and the tensors that lie in it now.

    Attributes:
        record: The record of the rank that had the memory.
        nbytes: The bytes of the tensors, tied ones once for each name.
        seconds: How long it took, from the first look for keepers on.
        verified: Whether digests have proven the bytes.
        shared: Whether the rank still uses the memory.
    """

    def __init__(
        self,
        rank: HeldRank,
        memory: OpenedRank,
        header: Header,
        tensors: Mapping[str, torch.Tensor],
        found: Mapping[str, TensorEntry],
        *,
        digests: Mapping[str, bytes] | None,
        seconds: float,
        share: Closable | None = None,
    ) -> None:
        """`digests` are those of the tensors that were compared."""
        self._rank = rank
        self._memory: OpenedRank | None = memory if share is not None else None
        self._header = header
        self._tensors = dict(tensors)
        self._found = dict(found)
        self._digests = digests
        self._share = share
        self.record: RankRecord = rank.record
        self.nbytes = sum(entry.nbytes for entry in found.values())
        self.seconds = seconds
        self.verified = digests is not None
        self.shared = share is not None
        if self.shared:
            self._mark_open()

    @property
    def version(self) -> int:
        """The version of the weights."""
        return self._header.version

    @property
    def content(self) -> str:
        """The content of the weights, as 32 hexadecimal digits."""
        return self._header.content

    @property
    def current(self) -> bool:
        """Whether the tensors are still what they were when they were adopted.

        Of shared weights False once an `update` of their owner has begun, or it has closed its
        publication. Look at it after each use: the weights may have changed before that. Of others
        always True.
        """
        memory = self._memory
        if not self.shared:
            return True
        return memory is not None and memory.header() == self._header

    def publish(
        self,
        registry: Registry,
        engine: Engine,
        *,
        instance: str,
        options: PublishOptions = PublishOptions(),
    ) -> Publication:
        """Offers the adopted tensors to loaders, with the content that they have.

        The rank, the world size, the model, the topology and the boxes are those of the rank that
        had them.

        Args:
            registry: Where the rank is registered.
            engine: Serves the memory.
            instance: The name of the instance, which may be another one.
            options: As for `publish`. `version`, `values` and `digests` that are not given are as
                with the rank that had the tensors.

        Returns:
            The publication, which the caller closes.

        Raises:
            DigestMismatch: The tensors have changed since, as digests show where they were
                compared. `publish` offers them as they are.
            LoaderError: The tensors are shared, so only their owner may offer them; or what
                `publish` raises.
            RegistryError: What `publish` raises.
        """
        record, manifest = self.record, self._rank.manifest
        if self.shared:
            raise LoaderError(
                f"{record.key} shares its weights with this process, so they cannot be published "
                "here",
                "publish a copy of them, or let their owner publish them",
            )
        options = replace(
            options,
            version=self.version if options.version is None else options.version,
            values=_values_of(manifest) if options.values is None else options.values,
            digests=manifest.digests is not None if options.digests is None else options.digests,
        )
        shards = {
            name: shard_of(entry)
            for name, entry in self._found.items()
            if not entry.opaque and not is_sharded(self._tensors[name])
        }
        return open_publication(
            registry,
            engine,
            Destination(self._tensors, shards),
            instance=instance,
            rank=record.rank,
            world_size=record.world_size,
            model=record.model,
            topology=record.topology,
            options=options,
            content=self.content,
            expected=self._digests,
            replaces=record.incarnation,
        )

    def close(self) -> None:
        """Ends the sharing, for the keeper. Of weights that are not shared it does nothing.

        The memory is given back with the last tensor that lies in it.
        """
        if self._share is not None:
            self._share.close()
            self._memory, self._tensors = None, {}
        self._mark_closed()

    def _label(self) -> str:
        return f"of {self.record.key}"


def _values_of(manifest: Manifest) -> dict[str, Any] | None:
    return {name: decode_value(value) for name, value in manifest.values.items()} or None
