"""The options that the calls of the package share: how to load, and how to publish.

Each field is checked when the options are made. A call that cannot honour an option refuses it by
name. Used by `publishing`, `loading` and `starting`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from engine_registry.errors import InvalidField
from engine_registry.schema.keys import check_instance
from engine_registry.schema.labels import check_labels
from engine_registry.schema.numbers import (
    MAX_TTL_S,
    MIN_TTL_S,
    MIN_UNRESPONSIVE_S,
    UNRESPONSIVE_AFTER_S,
    seconds,
    whole,
    whole_or_none,
)
from engine_registry.schema.record import ModelIdentity, check_version

if TYPE_CHECKING:
    import threading

    from engine_loader.transfer.pace import Pace
    from engine_loader.transfer.progress import OnProgress
    from engine_registry.registration.handle import OnState
    from engine_registry.watching.waiting import Wanted

Verify = Literal["auto", "header", "digest"]
RELEASED: Literal["released"] = "released"
Version = int | Literal["released"]
Options = TypeVar("Options", "LoadOptions", "PublishOptions", "Snapshots")
MAX_SNAPSHOTS = 8  # the record names each of them
MAX_DELTAS = 64  # a reader looks at the header of each
_CONTENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a load chooses its sources, reads them and checks them.

    Attributes:
        verify: What proves the bytes. `"header"` checks that all bytes are of one content.
            `"digest"` also compares each tensor with the digest that its source publishes.
            `"auto"` is `"digest"` where that costs next to nothing, as over cuda_ipc, and the
            sources have digests of all that is loaded; else `"header"`.
        version: The version to load. None loads the newest. `"released"` loads the version that is
            released: exactly the contents that its ranks held then. It waits until there is one.
        contents: The contents that the ranks of the source must have, by rank, as
            `InstanceStatus.contents` gives them. So several processes load the same weights.
        max_sources: How many sources with the same content are read at once, at most.
        partial: Whether the source may have more tensors than are loaded.
        reuse: Whether bytes that the tensors hold already stay, and are not read again: digests of
            them, block by block, are computed now and compared with those of the sources. That
            costs a pass over the tensors' memory. It pays where many blocks are equal: for a
            fine-tune of what the tensors hold, or for a rank that missed an update of some layers.
            From sources without digests all is read.
        base: What the tensors hold: `contents` of the report of the load that filled them, if
            nobody has changed them since. Sources that keep deltas from there bring only what has
            changed, and digests prove it, as with `reuse`, which this includes.
        also_from: Ranks with other contents that may hold many of the same blocks, as those of the
            base model or of the version before: the name of an instance, several names, or a
            ModelIdentity. With the sources, they are `max_sources` at most. Blocks with equal
            digests come from them too, and digests of the sources prove each. It pays where the
            sources are few or far. Without digests all comes from the sources.
        pipelined: Whether a rank that is still loading may be a source. Digests switch this off.
        pace: How much is in flight, and how long a source may stay silent. None takes the pace of
            the engine's protocol.
        progress: Called with a `Progress` while bytes arrive, and each second while none do, in the
            thread that loads.
        cancel: An event. The load ends with Cancelled once it is set, from any thread.

    Raises:
        InvalidField: An option is not valid; `details["field"]` names it.

    Example:
        `LoadOptions(verify="digest", max_sources=2)`
    """

    verify: Verify = "auto"
    version: Version | None = None
    contents: Sequence[str] | None = None
    max_sources: int = 4
    partial: bool = False
    reuse: bool = False
    base: Sequence[str] | None = None
    also_from: Wanted | None = None
    pipelined: bool = True
    pace: Pace | None = None
    progress: OnProgress | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        if self.verify not in get_args(Verify):
            raise InvalidField(
                f"`verify` {self.verify!r} is not valid",
                "say auto, header or digest",
                field="verify",
            )
        _set(self, "version", checked_version(self.version))
        _set(self, "contents", _checked_contents("contents", self.contents))
        _set(self, "base", _checked_contents("base", self.base))
        _set(self, "also_from", _checked_ranks("also_from", self.also_from))
        _set(self, "max_sources", whole("max_sources", self.max_sources, 1))
        _check(self, "partial", lambda value: isinstance(value, bool), "True or False")
        _check(self, "reuse", lambda value: isinstance(value, bool), "True or False")
        _check(self, "pipelined", lambda value: isinstance(value, bool), "True or False")
        _check(self, "pace", lambda value: hasattr(value, "chunk_nbytes"), "a Pace")
        _check(self, "progress", callable, "a function that takes a Progress")
        _check(self, "cancel", lambda value: hasattr(value, "is_set"), "a threading.Event")


@dataclass(frozen=True, kw_only=True)
class Snapshots:
    """Copies of the weights that readers have, while the tensors themselves change freely.

    Attributes:
        count: How many copies there are. Each takes the memory of all tensors. With two, one
            version is there beside the newest.
        device: Where they lie: `"cpu"`, pinned if the tensors are on GPUs, or a device of torch's.
            None is `"cpu"`, but the tensors' device for a protocol that reads memory of GPUs alone.
        buffers: Memory for them, which the caller lends: `count` contiguous tensors of uint8 on one
            device, of `snapshot_nbytes` each at least. None allocates it.
        retain_s: How many seconds a snapshot waits for the readers of the version that it takes
            the place of, from the moment on that this is not the newest any more. It takes the
            place of the oldest version that nobody reads, so it waits only if all are read.
        deltas: How many deltas are kept: what has changed from one version to the next, so that a
            reader that has the one reads only the changes. Deltas need digests.
        changed: The share of the elements of each tensor that may change from one version to the
            next. Each delta has memory for so many; where more have changed, there is none.

    Raises:
        InvalidField: A field is not valid; `details["field"]` names it.

    Example:
        `PublishOptions(snapshots=Snapshots(count=3, retain_s=60))`
    """

    count: int = 2
    device: str | None = None
    buffers: Sequence[Any] | None = None
    retain_s: float = 30.0
    deltas: int = 0
    changed: float = 0.05

    def __post_init__(self) -> None:
        """Raises InvalidField. `buffers` are checked where they are used."""
        _set(self, "count", whole("count", self.count, 2, MAX_SNAPSHOTS))
        _check(self, "device", lambda value: isinstance(value, str), "the name of a device")
        _check(
            self,
            "buffers",
            lambda value: isinstance(value, Sequence) and len(value) == self.count,
            f"{self.count} tensors of uint8",
        )
        _set(self, "retain_s", seconds("retain_s", self.retain_s))
        _set(self, "deltas", whole("deltas", self.deltas, 0, MAX_DELTAS))
        _check(self, "changed", _is_share, "a part of 1")


@dataclass(frozen=True, kw_only=True)
class PublishOptions:
    """How a rank's weights are offered.

    Attributes:
        generation: An id that all ranks of one launch share. None states none.
        version: A number for people; each update adds one. None is 0; a replica has the version of
            its source.
        digests: Whether loaders may verify every tensor. It costs a pass over all weights, at once
            and at every update. None: where that costs next to nothing, as over cuda_ipc.
        labels: Names and values by which people find the instance, as Kubernetes has them: 16 at
            most. All ranks of an instance have the same. A replica has these, and none of those of
            its source.
        values: Plain data by name, up to 1 MiB as JSON, which `EngineReader` gives to readers.
        ttl_s: How many seconds the rank stays listed after its whole host is lost.
        unresponsive_after_s: For how many seconds this process may be stopped, or hold the GIL,
            before the rank is marked as unresponsive. Loaders prefer other ranks then.
        snapshots: Readers have copies of the tensors instead of the tensors themselves: how many,
            or a `Snapshots`. `Publication.snapshot` makes a new version of them.
        deltas: How many deltas are kept of those by which loads bring these tensors from one
            version to the next, so that readers come by them as well. Deltas need digests. With
            `snapshots`, `Snapshots.deltas` says how many are written.
        changed: The share of the elements of each tensor that may change from one version to the
            next. Each of the `deltas` has memory for so many; a longer one is not kept.
        hold_s: For how many seconds the weights stay in memory after this process has ended without
            closing the publication, so that a process that is started in its place can `adopt`
            them. The tensors must be in arenas; see `arena_of`. It makes digests unless `digests`
            says otherwise. 0: they go with the process.
        on_state: Called with each change of the registration's state and its reason, from another
            thread.

    Raises:
        InvalidField: An option is not valid; `details["field"]` names it.

    Example:
        `PublishOptions(version=7, digests=True)`
    """

    generation: str | None = None
    version: int | None = None
    digests: bool | None = None
    labels: Mapping[str, str] | None = None
    values: Mapping[str, Any] | None = None
    ttl_s: float = 10.0
    unresponsive_after_s: float = UNRESPONSIVE_AFTER_S
    snapshots: Snapshots | int | None = None
    deltas: int = 0
    changed: float = 0.05
    hold_s: float = 0.0
    on_state: OnState | None = None

    def __post_init__(self) -> None:
        """Raises InvalidField. `values` are checked where they are encoded."""
        _check(
            self,
            "generation",
            lambda value: isinstance(value, str) and value.isprintable(),
            "one line of printable text",
        )
        _set(self, "version", None if self.version is None else check_version(self.version))
        _check(self, "digests", lambda value: isinstance(value, bool), "True or False")
        _set(self, "labels", None if self.labels is None else check_labels(self.labels))
        _check(self, "values", lambda value: isinstance(value, Mapping), "a mapping by name")
        _set(self, "ttl_s", seconds("ttl_s", self.ttl_s, MIN_TTL_S, MAX_TTL_S))
        after_s = seconds(
            "unresponsive_after_s", self.unresponsive_after_s, MIN_UNRESPONSIVE_S, MAX_TTL_S
        )
        _set(self, "unresponsive_after_s", after_s)
        if self.snapshots is not None and not isinstance(self.snapshots, Snapshots):
            count = whole("snapshots", self.snapshots, 2, MAX_SNAPSHOTS)
            _set(self, "snapshots", Snapshots(count=count))
        _set(self, "deltas", whole("deltas", self.deltas, 0, MAX_DELTAS))
        _check(self, "changed", _is_share, "a part of 1")
        snapshots = self.snapshots
        if self.deltas or (isinstance(snapshots, Snapshots) and snapshots.deltas):
            _check(self, "digests", lambda value: value is not False, "needed for deltas")
        if self.deltas and snapshots is not None:
            raise InvalidField(
                "`deltas` are of loads into the tensors, and readers have snapshots of these",
                "say `Snapshots(deltas=…)`",
                field="deltas",
            )
        _set(self, "hold_s", seconds("hold_s", self.hold_s, most=MAX_TTL_S))
        if self.hold_s and snapshots is not None:
            raise InvalidField(
                "`hold_s` is for readers of the tensors, and they have snapshots of these",
                "leave out one of the two",
                field="hold_s",
            )
        _check(self, "on_state", callable, "a function that takes a state and a reason")


def checked_version(version: object) -> Version | None:
    """A version to load, as it was given. Raises InvalidField."""
    return RELEASED if version == RELEASED else whole_or_none("version", version)


def number_of(options: LoadOptions) -> int | None:
    """The version to load, where that is a number."""
    return options.version if isinstance(options.version, int) else None


def refuse(options: LoadOptions | PublishOptions, call: str, reasons: Mapping[str, str]) -> None:
    """Refuses options that a call cannot honour.

    Args:
        options: The options that the call was given.
        call: The name of the call.
        reasons: Why, by the name of each option that the call cannot honour.

    A call that chooses the version itself takes `"released"` all the same.

    Raises:
        InvalidField: One of them has another value than its default.
    """
    for one in fields(options):
        if one.name in reasons and getattr(options, one.name) not in (one.default, RELEASED):
            raise InvalidField(
                f"{call} does not take the option `{one.name}`", reasons[one.name], field=one.name
            )


def _set(options: Options, field: str, value: object) -> None:
    object.__setattr__(options, field, value)


def _check(options: Options, field: str, is_good: Callable[[Any], bool], expected: str) -> None:
    """None passes where it is the default."""
    value = getattr(options, field)
    if value is None and getattr(type(options), field) is None:
        return
    if not is_good(value):
        raise InvalidField(f"`{field}` {value!r} is not valid: it is {expected}", field=field)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _checked_ranks(field: str, wanted: object) -> Wanted | None:
    if wanted is None or isinstance(wanted, ModelIdentity):
        return wanted
    names = [wanted] if isinstance(wanted, str) else wanted
    if not isinstance(names, Sequence) or not names:
        expected = "the name of an instance, several names, or a ModelIdentity"
        raise InvalidField(f"`{field}` {wanted!r} is not valid: it is {expected}", field=field)
    try:
        return tuple([check_instance(name) for name in names])
    except InvalidField as exc:
        raise InvalidField(f"`{field}`: {exc.what}", exc.remedy, field=field) from exc


def _checked_contents(field: str, contents: object) -> tuple[str, ...] | None:
    if contents is None:
        return None
    if not isinstance(contents, Sequence) or isinstance(contents, str):
        raise InvalidField(
            f"`{field}` {contents!r} is not valid: it is a sequence with one content for each rank",
            field=field,
        )
    for content in contents:
        if not isinstance(content, str) or not _CONTENT.fullmatch(content):
            raise InvalidField(
                f"`{field}` has {content!r}: a content is 32 hexadecimal digits", field=field
            )
    return tuple(contents)
