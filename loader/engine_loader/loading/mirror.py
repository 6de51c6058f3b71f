"""`Mirror`: the whole tensors of a source in the host's memory, kept from one version to the next,
so that a load brings only what has changed since.

Used by the integrations, whose engines serve meanwhile from other memory. Starts no thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from math import inf
from threading import Event

import torch

from engine_loader.digests.table import algorithm_for, digests_of
from engine_loader.engines.base import lend
from engine_loader.errors import LoaderError
from engine_loader.files.memory import allocate, extent, with_strides
from engine_loader.loading.report import LoadReport
from engine_loader.loading.whole_source import WholeSource, destination_of
from engine_loader.planning.layers import by_layer
from engine_loader.tensors.destination import Destination
from engine_loader.tensors.dtypes import dtype_named
from engine_loader.tensors.modes import plain_torch


class Mirror:
    """The whole tensors of one version of a source, in the host's memory.

    Attributes:
        tensors: The tensors by name.
        groups: The names of the tensors that belong together: first those of no layer, then those
            of each layer, as `Catalogue.groups` has them, but uncut.
        digests: The digest of each tensor, by name. Empty until a load has succeeded.
        contents: The contents of the source's ranks that the tensors hold. Empty while a load runs,
            and after one that failed: then the tensors are a mix.
        version: The version that they hold.
        nbytes: The bytes of the memory that the mirror takes.
        load_s: How many seconds the last load took, with its digests.
    """

    def __init__(self, source: WholeSource, *, pinned: bool = False) -> None:
        """Allocates the memory, pinned for copies to a GPU if so wished, and lends it to the
        engine. Reads nothing. Raises LoaderError where there is no memory, or EngineFailed.
        """
        self._wholes = source.wholes
        groups = by_layer(source.wholes, _UNCUT)
        self.groups = [tuple(whole.name for whole in group) for group in groups]
        layout = _layout(source)
        self.nbytes = mirror_nbytes(source, pinned=pinned)
        memory = _memory(extent(layout), pinned)
        self.tensors = with_strides(
            allocate(layout, memory=memory),
            {whole.name: whole.strides for whole in source.wholes},
        )
        self._destination = destination_of(source.wholes, self.tensors)
        self.digests: dict[str, bytes] = {}
        self.contents: tuple[str, ...] = ()
        self.version: int | None = None
        self.load_s = 0.0
        self._base: tuple[str, ...] = ()
        self._filled = False  # there is something that may be equal to what is loaded
        self._undo = ExitStack()
        # Lent for good, the memory is registered once and not for each load.
        regions = Destination({"memory": memory}).manifest.regions
        lend(source.reader.engine, self._undo, *regions, owner=memory)

    def fits(self, source: WholeSource) -> bool:
        """Whether the source has the same tensors, so that it can be loaded."""
        return set(source.wholes) == set(self._wholes)

    def load(
        self, source: WholeSource, timeout_s: float, cancel: Event | None = None
    ) -> LoadReport:
        """Brings the contents of the source, which `fits`. What the tensors hold of them already is
        not read, and changes are read where the source keeps them.

        Raises what `load` does. VersionUnavailable where the source has other contents by now.
        """
        began = time.monotonic()
        base, filled, digests = self._base, self._filled, self.digests
        self.contents, self._base, self._filled, self.digests = (), (), True, {}
        report = source.load(
            self._wholes,
            self._destination,
            timeout_s,
            base=base or None,
            reuse=filled,
            cancel=cancel,
        )
        if report.delta_nbytes or report.skipped_nbytes < report.nbytes or not digests:
            digests = digests_of(self.tensors, algorithm_for(torch.device("cpu")))
        self.contents, self._base, self.digests = source.contents, report.contents, digests
        self.version = source.records[0].version
        self.load_s = time.monotonic() - began
        return report

    def close(self) -> None:
        """Takes the memory back from the engine. Any number of times."""
        self.contents = self._base = ()
        self._undo.close()


_UNCUT = 1 << 62


def mirror_nbytes(source: WholeSource, *, pinned: bool = False) -> int:
    """The bytes that a mirror of the source takes."""
    nbytes = extent(_layout(source))
    # torch's allocator of pinned memory gives powers of two
    return 1 << max(0, nbytes - 1).bit_length() if pinned else nbytes


def fits_memory(nbytes: int, offers: Sequence[tuple[str, int | None]]) -> bool:
    """Whether each of these processes can have a mirror of so many bytes. Pure.

    Args:
        nbytes: The bytes that one mirror takes.
        offers: For each process, the name of its host, and the bytes that are available there;
            None where that is not known.

    Returns:
        Whether the mirrors take at most half of what is available on each host.
    """
    for host in {host for host, _ in offers}:
        available = [inf if left is None else left for name, left in offers if name == host]
        if len(available) * nbytes > min(available) / 2:
            return False
    return True


def _layout(source: WholeSource) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """In the order in which the tensors lie at the source."""
    return {whole.name: (dtype_named(whole.dtype), whole.shape) for whole in source.wholes}


@plain_torch()
def _memory(nbytes: int, pinned: bool) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    except RuntimeError as exc:  # as torch's OutOfMemoryError is
        why = " ".join(str(exc).split())[:200]
        raise LoaderError(
            f"there is no memory for a mirror of {nbytes} bytes: {why}",
            "switch `mirror` off",
            nbytes=nbytes,
        ) from exc
