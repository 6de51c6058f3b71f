"""`Mirroring`: a mirror of a trainer's weights beside an engine, so that an update of the engine
takes them from the host's memory. Used by the updates of vLLM and SGLang.

From the first update on it has a thread, which `close` ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine_loader.engines.base import Engine
from engine_loader.engines.machine import this_host
from engine_loader.errors import LoaderError, VersionUnavailable
from engine_loader.integrations.following import Following, load
from engine_loader.integrations.groups import gathered, read_one_content
from engine_loader.loading.mirror import Mirror, fits_memory, mirror_nbytes
from engine_loader.loading.whole_source import Reader, WholeSource
from engine_loader.options import RELEASED, LoadOptions, Version
from engine_loader.tensors.available import available_nbytes
from engine_registry import Registry
from engine_registry.schema.record import WITHIN_HOST
from engine_registry.telemetry.logs import fields
from engine_registry.watching.watch import Watch

log = logging.getLogger(__name__)
Connect = Callable[[], tuple[Registry, Engine]]


@dataclass(frozen=True)
class _Offer:
    """What a rank tells the others of its group."""

    host: str
    available_nbytes: int | None  # None where it is not known
    mirrors: bool  # it has a mirror of such weights
    holds: bool  # the mirror has these weights
    can: bool  # its transfer engine reads into the host's memory


class Mirroring:
    """One rank's mirror of the weights of one trainer.

    An update calls `take`. From then until `release`, the mirror stays as it is, and the engine
    takes the tensors that it wants. At other times the mirror follows the trainer: its newest
    version; or the released one, if the last update has taken that; or one that an update has asked
    for that does not wait.
    """

    def __init__(
        self, connect: Connect, source: str, options: LoadOptions, *, pinned: bool
    ) -> None:
        """Connects nothing, and takes no memory.

        Args:
            connect: Gives the registry and the transfer engine.
            source: The instance that the trainer publishes.
            options: How to load.
            pinned: Whether the mirror's memory is pinned, for copies to a GPU.
        """
        self._connect = connect
        self._source = source
        self._options = options
        self._pinned = pinned
        self._mirror: Mirror | None = None
        self._following: Following | None = None
        self._followed: Version | None = None
        self._said = False

    def take(
        self, group: Any, version: Version | None, timeout_s: float, *, wait: bool = True
    ) -> Mirror | None:
        """The mirror, with the same content on all ranks of the group, which all call it.

        What the mirror does not have yet is loaded now. The caller calls `release` in any case.

        Args:
            group: All ranks that take weights.
            version: The version to take, as in LoadOptions.
            timeout_s: How many seconds to wait for the trainer.
            wait: Whether to load now what the mirrors do not have yet.

        Returns:
            The mirror. None for all ranks where one of them has no memory for it, or a protocol
            that reads memory of GPUs alone.

        Raises:
            VersionUnavailable: Another rank has found no weights, or the trainer does not have
                these contents any more.
            LoaderError: What `load` raises; and without `wait`, where a mirror does not have the
                weights yet.
            RegistryError: What `load` raises.
        """
        self._followed = version if version == RELEASED or not wait else None
        found, failure = None, None
        try:
            found = read_one_content(
                group, lambda contents: self._find(version, contents, timeout_s)
            )
        except Exception as exc:  # noqa: BLE001  the other ranks of the group wait for this one
            failure = exc
        ours = True
        if self._following is not None and found is not None:
            ours = self._following.hold(found.contents, wait=wait)
        offers = gathered(group, self._offer(found, ours))
        if failure is not None:
            raise failure
        if found is None or None in offers:
            raise VersionUnavailable("another rank has found no weights", "look at its log")
        mirror = self._mirror_of(found, [offer for offer in offers if offer is not None])
        if mirror is None:
            return None
        if not wait and not all(offer.holds for offer in offers if offer is not None):
            raise LoaderError(
                f"the mirror does not have version {found.records[0].version} of {self._source} "
                "yet, and the model is as it was",
                "update again later, or let it `wait`",
                version=found.records[0].version,
            )
        if mirror.contents != found.contents:
            load(mirror, found, timeout_s)
        self._followed = version if version == RELEASED else None
        return mirror

    def release(self) -> None:
        """The mirror follows the trainer again. Any number of times."""
        if self._following is not None:
            self._following.resume()
        elif self._mirror is not None:
            self._following = Following(self._mirror, self._find_next, self._watch)
            self._following.resume()

    def close(self) -> None:
        """Ends the thread, and gives the memory back. Any number of times."""
        if self._following is not None:
            self._following.close()
        if self._mirror is not None:
            self._mirror.close()
        self._following = self._mirror = None

    def _find(
        self, version: Version | None, contents: Sequence[str] | None, timeout_s: float
    ) -> WholeSource:
        registry, engine = self._connect()
        options = replace(self._options, version=version, contents=contents)
        return Reader(registry, engine, self._source, options).find(timeout_s)

    def _find_next(self) -> WholeSource:
        return self._find(self._followed, None, 0.0)

    def _watch(self) -> Watch:
        return self._connect()[0].watch(self._source)

    def _offer(self, found: WholeSource | None, ours: bool) -> _Offer | None:
        if found is None:
            return None
        return _Offer(
            this_host(),
            available_nbytes(torch.device("cpu")),
            self._mirror is not None and self._mirror.fits(found),
            ours and self._mirror is not None and self._mirror.contents == found.contents,
            found.reader.engine.protocol not in WITHIN_HOST,
        )

    def _mirror_of(self, found: WholeSource, offers: Sequence[_Offer]) -> Mirror | None:
        """The mirror that there is, or a new one, if all ranks of the group have room for theirs.
        Each decides the same.
        """
        nbytes = mirror_nbytes(found, pinned=self._pinned)
        wanting = [(one.host, one.available_nbytes) for one in offers if not one.mirrors]
        why = ""
        if not all(offer.can for offer in offers):
            why = f"the protocol {found.reader.engine.protocol} reads memory of GPUs alone"
        elif not fits_memory(nbytes, wanting):
            least = min(left for _, left in wanting if left is not None)
            why = (
                f"it takes {nbytes / 1e9:.2f} GB for each of {len(offers)} ranks, and half of "
                f"{least / 1e9:.2f} GB that are available may be taken"
            )
        if why:
            self.close()
            self._say_without(found, nbytes, why)
            return None
        if self._mirror is None or not self._mirror.fits(found):
            self.close()
            self._mirror = Mirror(found, pinned=self._pinned)
            log.info(
                "a mirror of %d tensors of %s takes %.2f GB of %smemory",
                len(found.wholes),
                self._source,
                nbytes / 1e9,
                "pinned " if self._pinned else "",
                extra=fields("mirror_made", source=self._source, nbytes=nbytes),
            )
        return self._mirror

    def _say_without(self, found: WholeSource, nbytes: int, why: str) -> None:
        if self._said:
            return
        self._said = True
        log.warning(
            "there is no mirror of the weights of %s, so updates read them while the engine stops: "
            "%s",
            self._source,
            why,
            extra=fields("mirror_unfit", source=self._source, nbytes=nbytes, why=why),
        )
