"""`adopt`: a new process has the weights of one that has ended where they are, without a copy."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from engine_loader.adopting.adopted import Adopted
from engine_loader.adopting.finding import HeldRank, find_each
from engine_loader.adopting.matching import match
from engine_loader.adopting.memory import OpenedRank
from engine_loader.adopting.placing import Wanted
from engine_loader.digests.table import ALGORITHMS, digests_of
from engine_loader.errors import EngineFailed, HeldUnusable, TensorsUnusable, listed
from engine_loader.loading.module import check_all_can_be_filled
from engine_loader.publishing.header import Header
from engine_loader.publishing.holding import name_of
from engine_loader.tensors.shards import Shard
from engine_registry import ModelIdentity, Registry, TensorEntry, failpoints
from engine_registry.errors import KeeperFailed
from engine_registry.lifetime import Closable
from engine_registry.registration.held import share, take
from engine_registry.registration.hold import HOST
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_USELESS = ("torn", "digests")  # reasons for which held memory is let go


def adopt(
    registry: Registry,
    model: ModelIdentity,
    tensors: Mapping[str, torch.Tensor] | nn.Module,
    *,
    rank: int,
    world_size: int,
    topology: Mapping[str, tuple[int, int]] | None = None,
    shards: Mapping[str, Shard] | None = None,
    verify: bool = True,
    shared: bool = False,
) -> Adopted | None:
    """Gives tensors the memory of a rank whose process has ended, or shares that of one that lives.

    The rank was published with `PublishOptions(hold_s=…)` by a process of this user on this host.
    Its keeper has held the memory since. Where several are held, as of replicas on one host, it is
    the newest one on the device of the tensors that no other process takes. Nothing is copied: the
    tensors become views of it, and stay the same objects. What memory they had is freed. Tensors on
    the meta device get theirs so. Tied tensors stay tied, and strides stay as they are. All is
    checked before the first tensor changes. Then the keeper lets the memory go, and it is this
    process's alone.

    With `shared` the rank goes on using it, and it cannot be written to here. On the host, that
    ends this process by SIGSEGV; on a GPU, CUDA reports an illegal memory access, after which this
    process cannot use the GPU any more. See `Adopted.current` for what happens when its owner
    changes it.

    Args:
        registry: Where the rank was registered.
        model: The model.
        tensors: The tensors, by the names by which they were published; or a module, whose
            `state_dict()` has them.
        rank: The world rank, from 0.
        world_size: How many ranks the instance had, over all parallel axes.
        topology: The place of the rank along each parallel axis, as it was published.
        shards: Which part of the whole a tensor is, by name. A tensor without one is taken for
            what the rank has published.
        verify: Whether to compare digests, if the rank has published them, as it does unless it
            said otherwise.
        shared: Whether to share the memory of a rank that lives, or is held, for reading alone.

    Returns:
        What was adopted. None where nothing of the kind is held, or shared, on this host.

    Raises:
        HeldUnusable: What is held cannot be adopted; `details["reason"]` says why. The tensors are
            as they were.
        InvalidField: An argument is not valid; `details["field"]` names it.
        EtcdError: Etcd cannot be reached, or refuses.

    Example:
        ```python
        adopted = adopt(registry, ModelIdentity("qwen"), module, rank=0, world_size=1)
        if adopted is None:
            load_module(registry, engine, "qwen", module, rank=0)
        ```
    """
    began = time.monotonic()
    wanted: Wanted | None = None
    failed: HeldUnusable | None = None
    for found in find_each(registry, model, rank, world_size, topology, shared):
        try:
            with _explained(found):
                wanted = wanted or _wanted(tensors, shards)
                if not _is_near(found, wanted):
                    continue
                adopted = (_share if shared else _adopt)(found, wanted, verify, began)
        except HeldUnusable as exc:
            failed = failed or exc
        else:
            log.info(
                "%s of %s, %d bytes, in %.3f s",
                "shares the weights" if shared else "adopted the weights",
                found.record.key,
                adopted.nbytes,
                adopted.seconds,
                extra=fields(
                    "adopted", key=found.record.key, nbytes=adopted.nbytes, seconds=adopted.seconds
                ),
            )
            return adopted
    if failed is not None:
        raise failed
    return None


@contextmanager
def _explained(found: HeldRank) -> Iterator[None]:
    """Whatever is wrong with the tensors, or with what that rank has left, is HeldUnusable."""
    try:
        yield
    except TensorsUnusable as exc:
        raise _unusable(found, "tensors", exc.what, exc.remedy, **exc.details) from exc
    except (EngineFailed, KeeperFailed) as exc:
        raise _unusable(found, "gone", f"its memory cannot be had: {exc.what}", exc.remedy) from exc


def _wanted(
    tensors: Mapping[str, torch.Tensor] | nn.Module, shards: Mapping[str, Shard] | None
) -> Wanted:
    if isinstance(tensors, nn.Module):
        own = tensors.state_dict(keep_vars=True)
        check_all_can_be_filled(tensors, own)
        tensors = own
    return Wanted(tensors, shards)


def _is_near(found: HeldRank, wanted: Wanted) -> bool:
    """Whether some of the memory lies where tensors do. Those that have none get theirs on the host
    or on the current GPU. Where the memory of a rank lies that will not be held is not known.
    """
    there = set(found.kept.devices)
    here = {name_of(device) for device in wanted.devices}
    if not here:
        here = {HOST}
        if torch.cuda.is_available():
            here.add(name_of(torch.device("cuda", torch.cuda.current_device())))
    return not there or not here.isdisjoint(there)


def _adopt(found: HeldRank, wanted: Wanted, verify: bool, began: float) -> Adopted:
    with take(found.place) as taken:
        memory = OpenedRank(found, shared=False)
        try:
            checked = _check(found, memory, wanted, verify)
        except HeldUnusable as exc:
            if exc.details["reason"] in _USELESS:
                taken.finish()
            raise
        failpoints.reach("adopt.before_finish")
        taken.finish()  # from here on nobody else can have the memory
    wanted.put(checked.views)
    memory.erase_header()
    return _adopted(found, memory, wanted, checked, began)


def _share(found: HeldRank, wanted: Wanted, verify: bool, began: float) -> Adopted:
    with ExitStack() as undo:
        sharing = undo.enter_context(share(found.place))
        memory = OpenedRank(found, shared=True)
        checked = _check(found, memory, wanted, verify)
        if memory.header() != checked.header:
            raise _torn(found)
        wanted.put(checked.views)
        undo.pop_all()
    return _adopted(found, memory, wanted, checked, began, sharing)


class _Checked(NamedTuple):
    """What was found good."""

    header: Header
    found: dict[str, TensorEntry]  # what is held, by the names of the tensors
    views: dict[str, torch.Tensor]
    digests: dict[str, bytes] | None  # by the names of the tensors; None: not compared


def _check(found: HeldRank, memory: OpenedRank, wanted: Wanted, verify: bool) -> _Checked:
    header = memory.header()
    if header is None or header.incarnation != found.record.incarnation or header.updating:
        raise _torn(found)
    matching, problems = match(found.manifest.tensors, wanted.entries)
    if not problems:
        views = memory.views(matching, wanted.parts)
        problems = wanted.elsewhere({name: view.device for name, view in views.items()})
    if problems:
        raise _unusable(
            found,
            "tensors",
            f"{len(problems)} tensors differ: {listed(problems)}",
            "adopt tensors like those that were published",
            problems=problems,
        )
    wanted.prepare(views)
    digests = _compare(found, memory, matching, views) if verify else None
    return _Checked(header, matching, views, digests)


def _compare(
    found: HeldRank,
    memory: OpenedRank,
    matching: Mapping[str, TensorEntry],
    views: Mapping[str, torch.Tensor],
) -> dict[str, bytes] | None:
    table = found.manifest.digests
    if table is None or table.algorithm not in ALGORITHMS:
        return None
    theirs = memory.digests()
    mine = {entry.name: views[name] for name, entry in matching.items() if entry.nbytes}
    ours = digests_of(mine, table.algorithm)
    differing = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        raise _unusable(
            found,
            "digests",
            f"{len(differing)} of {len(ours)} tensors are not what it has published, so its "
            f"memory is of no use: {listed(differing)}",
            "load from peers or from files; and check whether anything writes to weights outside "
            "of `update`",
            problems=differing,
        )
    return {name: theirs[entry.name] for name, entry in matching.items()}


def _adopted(
    found: HeldRank,
    memory: OpenedRank,
    wanted: Wanted,
    checked: _Checked,
    began: float,
    sharing: Closable | None = None,
) -> Adopted:
    return Adopted(
        found,
        memory,
        checked.header,
        wanted.tensors,
        checked.found,
        digests=checked.digests,
        seconds=time.monotonic() - began,
        share=sharing,
    )


def _torn(found: HeldRank) -> HeldUnusable:
    return _unusable(
        found,
        "torn",
        "its weights were being changed, so they are not of one version",
        "load from peers or from files",
    )


def _unusable(
    found: HeldRank, reason: str, what: str, remedy: str, **details: object
) -> HeldUnusable:
    return HeldUnusable(
        f"the weights that the keeper of {found.record.key} has cannot be adopted: {what}",
        remedy,
        **{**details, "key": found.record.key, "reason": reason},
    )
