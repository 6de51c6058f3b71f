"""From manifests to the reads that fill one of them from the others. Pure: no torch, no network.

Adjectives name the side: `src_addr` lies in the memory of a rank read from, `dst_addr` in that of
the process being filled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine_loader.errors import WeightsMismatch, listed
from engine_loader.planning.boxes import Lines
from engine_loader.planning.coverage import check_coverage
from engine_loader.planning.matching import Offers, Origin
from engine_loader.planning.reads import Costs, Span, Srcs, bundle, coalesce, cut_lines, gather
from engine_loader.planning.tied import stand_ins
from engine_registry.collector import collector_paused
from engine_registry.schema.manifest import Manifest, TensorEntry


@dataclass(frozen=True)
class ReadOp:
    """Copy `nbytes` bytes from the source's `src_addr` to our `dst_addr`.

    Stays inside one registered region on either side. `lines`, only for an engine that `strides`,
    are the runs among these bytes that are to be copied: `src` and `dst` count from the two
    addresses. `pieces`, only for an engine that `scatters`, are single runs among these bytes that
    are to be copied: `src` counts from the source's address, `dst` is an address.
    """

    source: str
    src_addr: int
    dst_addr: int
    nbytes: int
    lines: Lines | None = None
    pieces: tuple[Lines, ...] = ()

    @property
    def dst_nbytes(self) -> int:
        """From the first to the last byte that is written, with what lies between."""
        return self.nbytes if self.lines is None else self.lines.dst_extent


_COSTS = Costs()


def plan(
    origins: Sequence[Origin], dst: Manifest, costs: Costs = _COSTS, *, partial: bool = False
) -> tuple[Span, ...]:
    """What to read to fill every tensor of `dst`; `partial`: the origins may hold tensors that are
    not wanted.

    Of tensors that are the same memory (see `planning.tied`) one name on both sides is enough.
    WeightsMismatch names every difference; it is raised before there is any plan.
    """
    return Planner(dst, costs, partial).make(origins)


def differences(origins: Sequence[Origin], dst: Manifest, *, partial: bool = False) -> list[str]:
    """One line for every tensor that the origins lack or cannot fill, and, unless `partial`, that
    only they have.
    """
    return Planner(dst, partial=partial).differences(origins)


class Planner:
    """Of plans that fill `dst`. Those that were made last, by whichever planner, are kept, and so
    are not made again where the same ranks are read again and again, into the same memory, as each
    version of what a trainer makes is.
    """

    def __init__(self, dst: Manifest, costs: Costs = _COSTS, partial: bool = False) -> None:
        self._dst = dst
        self._costs = costs
        self._partial = partial
        self._origins: list[Origin] = []  # that were compared last
        self._filling: _Filling | None = None  # and what came of it

    def into(self, dst: Manifest) -> Planner:
        """The same for `dst`, which differs in its regions only, or not at all."""
        if dst is self._dst:
            return self  # which knows already what came of the comparison
        return Planner(dst, self._costs, self._partial)

    @collector_paused
    def differences(self, origins: Sequence[Origin]) -> list[str]:
        return [] if self._kept(origins) is not None else self._fill(origins).problems

    @collector_paused
    def plan(self, origins: Sequence[Origin]) -> tuple[Span, ...]:
        """As `make`, unless it has been made."""
        spans = self._kept(origins)
        if spans is None:
            spans = self.make(origins)
            _PLANS.append(_Plan(list(origins), self._dst, self._costs, self._partial, spans))
        return spans

    @collector_paused
    def make(self, origins: Sequence[Origin]) -> tuple[Span, ...]:
        filling = self._fill(origins)
        refuse(" and ".join(dict.fromkeys(origin.name for origin in origins)), filling.problems)
        regions = [origin.manifest.regions for origin in origins]
        straight = [part for part in filling.parts if not part.lines]
        spans = coalesce(straight, regions, self._dst.regions)
        if self._costs.scattered:
            spans = bundle(spans, regions, self._costs)
        elif not self._costs.strided:
            spans = gather(spans, regions, self._costs)
        spans += [
            span for part in filling.parts if part.lines for span in cut_lines(part, self._costs)
        ]
        check_coverage(spans, filling.tensors)
        return tuple(spans)

    def _fill(self, origins: Sequence[Origin]) -> _Filling:
        if self._filling is None or not _alike(self._origins, origins):
            self._origins, self._filling = list(origins), _fill(origins, self._dst, self._partial)
        return self._filling

    def _kept(self, origins: Sequence[Origin]) -> tuple[Span, ...] | None:
        for made in tuple(_PLANS):
            same = (made.costs, made.partial) == (self._costs, self._partial)
            if not same or not _alike(made.origins, origins):
                continue
            if made.dst is not self._dst:
                if made.dst != self._dst:
                    continue
                made.dst = self._dst  # the same object may come again, and is compared at once
            return made.spans
        return None


class _Filling(NamedTuple):
    """What is in the way; the tensors, those that share memory as one; and the parts that these are
    put together from.
    """

    problems: list[str]
    tensors: list[TensorEntry]
    parts: list[Span]


@dataclass
class _Plan:
    origins: list[Origin]
    dst: Manifest
    costs: Costs
    partial: bool
    spans: tuple[Span, ...]


KEPT_PLANS = 2  # of 100,000 tensors one takes 50 MB
_PLANS: deque[_Plan] = deque(maxlen=KEPT_PLANS)


def keep_plans(count: int) -> None:
    """Keep that many plans from now on: the newest."""
    global _PLANS
    _PLANS = deque(_PLANS, maxlen=count)


def _alike(some: Sequence[Origin], others: Sequence[Origin]) -> bool:
    """Manifests are compared as objects: `manifests.py` keeps those that were fetched last."""
    return len(some) == len(others) and all(
        one.manifest is other.manifest and one.own == other.own
        for one, other in zip(some, others, strict=True)
    )


def _fill(origins: Sequence[Origin], dst: Manifest, partial: bool) -> _Filling:
    offers = Offers(origins)
    problems: dict[str, str] = {}
    filled: list[TensorEntry] = []
    parts: list[Span] = []
    begin = 0  # of the parts of the last one
    tied = stand_ins(dst.tensors, offers)  # what fills the other name fills them
    for entry in sorted(dst.tensors, key=lambda entry: (entry.addr, -entry.nbytes)):
        if entry.name in tied:
            continue
        some, problem = offers.parts_of(entry)
        last = filled[-1] if filled else None
        if problem:
            problems[entry.name] = problem
        elif not some:
            continue
        elif last is None or entry.addr >= last.addr + last.nbytes:
            begin = len(parts)
            filled.append(entry)
            parts += some
        elif both := _union(parts[begin:], some):
            filled[-1] = replace(
                last, nbytes=max(last.nbytes, entry.addr + entry.nbytes - last.addr)
            )
            parts[begin:] = both
        else:
            problems[entry.name] = (
                f"shares memory with {last.name} here, but not in the same way in the source"
            )
    lines = [
        f"{entry.name}: {problems[entry.name]}" for entry in dst.tensors if entry.name in problems
    ]
    return _Filling(([] if partial else offers.unexpected(dst)) + lines, filled, parts)


def _union(last: Sequence[Span], one: Sequence[Span]) -> list[Span]:
    """Both, from the sources in which they share memory in the same way as here; nothing if there
    are none.
    """
    first, second = last[0], one[0]
    if [part._replace(srcs=()) for part in last] == [part._replace(srcs=()) for part in one]:
        both = [
            mine._replace(srcs=_common(mine.srcs, other.srcs))
            for mine, other in zip(last, one, strict=True)
        ]
    elif (
        len(last) == len(one) == 1 and not first.lines and not second.lines
    ):  # views of one run of memory
        ahead = second.dst_addr - first.dst_addr
        both = [
            Span(
                first.dst_addr,
                max(first.nbytes, ahead + second.nbytes),
                _common(first.srcs, second.srcs, ahead),
            )
        ]
    else:
        return []
    return both if all(part.srcs for part in both) else []


def _common(first: Srcs, second: Srcs, ahead: int = 0) -> Srcs:
    """The first ones, of sources that hold the second so far ahead of it."""
    others = set(second)
    return tuple([(number, addr) for number, addr in first if (number, addr + ahead) in others])


def refuse(source: str, problems: Sequence[str]) -> None:
    if problems:
        count = f"{len(problems)} difference{'s' if len(problems) > 1 else ''}"
        raise WeightsMismatch(
            f"the weights of {source} do not match ({count}), nothing was read: {listed(problems)}",
            source=source,
            problems=list(problems),
        )
