"""From manifests to the reads that fill one of them from the others. Pure: no torch, no network.

Adjectives name the side: `src_addr` lies in the memory of a rank read from, `dst_addr` in that of the process being filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loader.coverage import check_coverage
from loader.errors import WeightsMismatch, listed
from loader.garbage import collector_paused
from loader.offers import Offers, Origin
from loader.reads import Costs, Span, Srcs, coalesce, cut_lines, gather
from registry.manifest import Manifest, TensorEntry


@dataclass(frozen=True)
class ReadOp:
    """Copy `nbytes` bytes from the source's `src_addr` to our `dst_addr`. Stays inside one registered region on either side."""

    source: str
    src_addr: int
    dst_addr: int
    nbytes: int


_COSTS = Costs()


@collector_paused
def plan(origins: Sequence[Origin], dst: Manifest, costs: Costs = _COSTS, *, partial: bool = False) -> tuple[Span, ...]:
    """What to read to fill every tensor of `dst`; `partial`: the origins may hold tensors that are not wanted.

    WeightsMismatch names every difference; it is raised before there is any plan.
    """
    problems, filled, parts = _fill(origins, dst, partial)
    refuse(" and ".join(dict.fromkeys(origin.name for origin in origins)), problems)
    regions = [origin.manifest.regions for origin in origins]
    spans = gather(coalesce([part for part in parts if not part.lines], regions, dst.regions), regions, costs)
    spans += [span for part in parts if part.lines for span in cut_lines(part, costs)]
    check_coverage(spans, filled)
    return tuple(spans)


def differences(origins: Sequence[Origin], dst: Manifest, *, partial: bool = False) -> list[str]:
    """One line for every tensor that the origins lack or cannot fill, and, unless `partial`, that only they have."""
    return _fill(origins, dst, partial)[0]


def _fill(origins: Sequence[Origin], dst: Manifest, partial: bool) -> tuple[list[str], list[TensorEntry], list[Span]]:
    """What is in the way; the tensors, those that share memory as one; and the parts that these are put together from."""
    offers = Offers(origins)
    problems: dict[str, str] = {}
    filled: list[TensorEntry] = []
    parts: list[Span] = []
    begin = 0  # of the parts of the last one
    for entry in sorted(dst.tensors, key=lambda entry: (entry.addr, -entry.nbytes)):
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
            filled[-1] = replace(last, nbytes=max(last.nbytes, entry.addr + entry.nbytes - last.addr))
            parts[begin:] = both
        else:
            problems[entry.name] = f"shares memory with {last.name} here, but not in the same way in the source"
    told = [f"{entry.name}: {problems[entry.name]}" for entry in dst.tensors if entry.name in problems]
    return ([] if partial else offers.unexpected(dst)) + told, filled, parts


def _union(last: Sequence[Span], one: Sequence[Span]) -> list[Span]:
    """Both, from the sources in which they share memory in the same way as here; nothing if there are none."""
    first, second = last[0], one[0]
    if [part._replace(srcs=()) for part in last] == [part._replace(srcs=()) for part in one]:
        both = [mine._replace(srcs=_alike(mine.srcs, other.srcs)) for mine, other in zip(last, one, strict=True)]
    elif len(last) == len(one) == 1 and not first.lines and not second.lines:  # views of one run of memory
        ahead = second.dst_addr - first.dst_addr
        both = [Span(first.dst_addr, max(first.nbytes, ahead + second.nbytes), _alike(first.srcs, second.srcs, ahead))]
    else:
        return []
    return both if all(part.srcs for part in both) else []


def _alike(first: Srcs, second: Srcs, ahead: int = 0) -> Srcs:
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
