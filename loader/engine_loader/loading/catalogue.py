"""`Catalogue`: the whole tensors of a source, one after another, for consumers that take weights as
an iterable: the `load_weights` of an inference engine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch

from engine_loader.engines.base import Engine
from engine_loader.errors import (
    SourceLost,
    SourceUnreachable,
    TornRead,
    VersionUnavailable,
    WeightsMismatch,
    listed,
)
from engine_loader.loading.together import load_together
from engine_loader.loading.whole_source import Groups, Loaded, Loads, Reader, WholeSource
from engine_loader.options import RELEASED, LoadOptions, refuse
from engine_loader.planning.layers import by_layer, in_order
from engine_loader.planning.whole import Whole
from engine_loader.tensors.dtypes import dtype_named
from engine_registry import Registry
from engine_registry.errors import (
    EngineRegistryError,
    InstanceIncomplete,
    InstanceNotFound,
    InvalidField,
)
from engine_registry.schema.numbers import seconds, whole
from engine_registry.watching.waiting import Wanted

T = TypeVar("T")
MAX_GROUP_NBYTES = 1 << 30
_REFUSED = {
    "partial": "leave it out: `names` says which tensors are wanted",
    "reuse": "leave it out: the tensors are new",
    "base": "leave it out: the tensors are new",
}


@dataclass(frozen=True)
class TensorSpec:
    """A whole tensor that a source holds.

    Attributes:
        dtype: Its dtype.
        shape: Its shape, put together from the shards of all ranks.
        nbytes: Its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class Catalogue:
    """The whole tensors of a source, in groups by layer. `read_catalogue` makes it.

    Iterating brings the tensors: pairs of a name and a tensor, in the order of `groups`. All of
    them are of the same contents. They lie in memory that is used for one group after another, so a
    tensor holds its weights until the first tensor of the next group is asked for. A consumer
    copies what it wants to keep. Each iteration has memory for the largest group, and frees it at
    its end.

    If the source changes before the first group is there, the iteration begins with the contents
    that are served then. Later that is an error. Every error that ends an iteration says in
    `details["given"]` which tensors were given out before; after it the next iteration begins with
    the contents that are served then.

    Attributes:
        tensors: The tensors by name, in order. They stay the same.

    Example:
        `model.load_weights(iter(read_catalogue(registry, engine, "trainer")))`
    """

    def __init__(self, reader: Reader, timeout_s: float, max_group_nbytes: int) -> None:
        """Finds the source."""
        self._reader = reader
        self._timeout_s = timeout_s
        self._max_group_nbytes = max_group_nbytes
        self._source = self._again(reader.find)
        self._stale = False  # its contents may not be served any more
        self.tensors = self._specs(self._source)

    @property
    def instance(self) -> str:
        """The instance whose ranks hold the contents; others may hold the same."""
        return self._source.records[0].instance

    @property
    def version(self) -> int:
        """The version of the tensors that an iteration brings."""
        return self._source.records[0].version

    @property
    def contents(self) -> tuple[str, ...]:
        """The contents of the ranks, by rank, for `LoadOptions`: so several processes read the
        same.
        """
        return self._source.contents

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    def __repr__(self) -> str:
        return (
            f"<Catalogue of {self.instance!r}: version {self.version}, {len(self.tensors)} "
            f"tensors, {self.nbytes} bytes>"
        )

    def groups(self) -> list[tuple[str, ...]]:
        """The names of the tensors that come together, in the order in which they come.

        A layer is a group: names that are the same up to their first number, as
        `model.layers.3.…`. Tensors of no layer come first. Numbers are in the order of their
        values. A group of more than `max_group_nbytes` is cut.

        Returns:
            The groups. They follow from the names and sizes alone.
        """
        return [tuple(whole.name for whole in group) for group in self._groups(self._source)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Brings the tensors one by one. Raises what `by_group` raises."""
        for tensors in self.by_group():
            yield from tensors.items()

    def by_group(self) -> Iterator[dict[str, torch.Tensor]]:
        """Brings the tensors a group at a time.

        Yields:
            The tensors of a group by name, valid until the next group is asked for.

        Raises:
            TornRead: The source has other contents now, and some tensors were given out.
            SourceLost: Every source went away.
            WeightsMismatch: The source had other contents before a tensor was given out, and has
                other tensors now.
            LoaderError: What `load` raises.
            RegistryError: What `load` raises.
        """
        given: list[str] = []
        try:
            with closing(self._loads()) as loads:
                for tensors, _ in loads:
                    ordered = {name: tensors[name] for name in in_order(tensors)}
                    given += ordered
                    yield ordered
        except EngineRegistryError as exc:
            self._stale = True
            raise self._with_given(exc, given) from exc

    def _groups(self, source: WholeSource) -> list[list[Whole]]:
        return by_layer(source.wholes, self._max_group_nbytes)

    def _specs(self, source: WholeSource) -> dict[str, TensorSpec]:
        return {
            whole.name: TensorSpec(dtype_named(whole.dtype), whole.shape, whole.nbytes)
            for group in self._groups(source)
            for whole in group
        }

    def _loads(self) -> Loads:
        """Begins again until the first group is there."""
        if not self.tensors:
            return
        first, others = self._again(self._begin)
        with closing(others):
            yield first
            yield from others

    def _again(self, attempt: Callable[[float], T]) -> T:
        """Of contents that the caller has chosen there are no others to begin again with."""
        options = self._reader.options
        if options.version not in (None, RELEASED) or options.contents is not None:
            return attempt(self._timeout_s)
        what = "one look and the next"
        return load_together(attempt, self._timeout_s, what, options.version)[0]

    def _begin(self, wait_s: float) -> tuple[Loaded, Loads]:
        if self._stale:
            self._renew(wait_s)
        self._stale = True
        loads = self._source.fill(self._in_memory_order(), wait_s)
        first = next(loads)
        self._stale = False
        return first, loads

    def _in_memory_order(self) -> Groups:
        """So that each group takes few, long reads."""
        place = {whole.name: at for at, whole in enumerate(self._source.wholes)}
        return [
            sorted(group, key=lambda whole: place[whole.name])
            for group in self._groups(self._source)
        ]

    def _renew(self, wait_s: float) -> None:
        source = self._reader.find(wait_s)
        specs = self._specs(source)
        if specs != self.tensors:
            changed = [
                name
                for name in in_order(specs.keys() | self.tensors.keys())
                if specs.get(name) != self.tensors.get(name)
            ]
            raise WeightsMismatch(
                f"{source.records[0].instance!r} has other tensors than when its catalogue was "
                f"read: {listed(changed)}",
                "read its catalogue again",
                tensors=changed,
            )
        self._source = source

    def _with_given(self, exc: EngineRegistryError, given: list[str]) -> EngineRegistryError:
        kind, what = type(exc), exc.what
        if given:
            what = (
                f"{len(given)} of {len(self.tensors)} tensors of {self.instance!r} version "
                f"{self.version} were given out, and the others cannot be: {what}"
            )
            if isinstance(exc, VersionUnavailable):
                kind = TornRead
            elif isinstance(exc, InstanceNotFound | InstanceIncomplete | SourceUnreachable):
                kind = SourceLost
        details = {name: value for name, value in exc.details.items() if name != "complete"}
        return kind(what, exc.remedy, **details, given=given)


def read_catalogue(
    registry: Registry,
    engine: Engine,
    source: Wanted,
    *,
    names: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    max_group_nbytes: int = MAX_GROUP_NBYTES,
    timeout_s: float = 60.0,
    options: LoadOptions = LoadOptions(),
) -> Catalogue:
    """Reads which whole tensors a source has, from whatever layout it has them in. No tensor moves
    before the catalogue is iterated.

    Args:
        registry: Finds the sources.
        engine: Reads their memory.
        source: As for `load`.
        names: The tensors that are wanted. None wants all.
        device: Where the tensors are put together: "cpu", or an accelerator that the engine can
            read into.
        max_group_nbytes: Bytes of tensors in one group, at most. A larger tensor is a group for
            itself.
        timeout_s: How many seconds to wait until a source is ready, here and in an iteration.
        options: How to choose, read and check; see LoadOptions. Without `partial`,
            `reuse` and `base`.

    Returns:
        The catalogue of the source.

    Raises:
        WeightsMismatch: The source does not have some of `names`; or ranks do not say which part of
            the whole their tensors are, or do not have all of it.
        VersionUnavailable: The version or the contents of `options` are not served.
        SourceUnreachable: There are sources, and this engine can read none of them.
        Cancelled: `options.cancel` was set.
        InvalidField: An argument is not valid; `details["field"]` names it.
        RegistryError: What `Registry.resolve` raises.
    """
    refuse(options, "read_catalogue", _REFUSED)
    reader = Reader(registry, engine, source, options, _names(names), _device(device))
    timeout_s = seconds("timeout_s", timeout_s)
    return Catalogue(reader, timeout_s, whole("max_group_nbytes", max_group_nbytes, 1))


def _names(names: object) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Collection):
        raise InvalidField(
            f"`names` {names!r} is not valid: it is a collection of names", field="names"
        )
    for name in names:
        if not isinstance(name, str):
            raise InvalidField(f"`names` has {name!r}, which is no name", field="names")
    return tuple(in_order(set(names)))


def _device(device: str | torch.device) -> str:
    try:
        return str(torch.device(device))
    except (RuntimeError, TypeError) as exc:
        raise InvalidField(
            f"`device` {device!r} is not valid: it is the name of a device of torch",
            field="device",
        ) from exc
