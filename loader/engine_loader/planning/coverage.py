"""The proof that a plan writes every byte that is wanted once. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from engine_loader.planning.boxes import Lines
from engine_loader.planning.reads import Span
from engine_registry.schema.manifest import TensorEntry


def check_coverage(spans: Sequence[Span], tensors: Iterable[TensorEntry]) -> None:
    """Proves that the spans write every byte of the tensors, which do not overlap, once, and no
    other; ValueError else.
    """
    wanted = sorted([(entry.addr, entry.addr + entry.nbytes) for entry in tensors if entry.nbytes])
    if any(last[1] > one[0] for last, one in itertools.pairwise(wanted)):
        raise ValueError("two tensors share memory")
    runs, scattered = _writes(spans)
    gaps = _without(_merge(wanted), sorted(runs))
    if scattered or gaps:
        base = min([start for start, _ in gaps] + [some.dst for some in scattered])
        powers = _Powers()
        theirs = sum([powers.of(some.at(0, -base)) for some in scattered])
        ours = sum([powers.of(Lines(0, start - base, end - start)) for start, end in gaps])
        if (theirs - ours) % powers.MODULUS:
            raise ValueError("the plan does not write exactly the bytes of the tensors")


def _writes(spans: Iterable[Span]) -> tuple[list[tuple[int, int]], list[Lines]]:
    """From where to where the spans write bytes in a row, and the rest."""
    runs: list[tuple[int, int]] = []
    scattered: list[Lines] = []
    for span in spans:
        if not span.lines:
            runs.append((span.dst_addr, span.dst_addr + span.nbytes))
        for some in span.lines:
            if some.src < 0 or some.src + some.extent > span.nbytes:
                raise ValueError("the plan copies from beside what it has read")
            if some.counts:
                scattered.append(some)
            else:
                runs.append((some.dst, some.dst + some.nbytes))
    return runs, scattered


def _without(
    wanted: Sequence[tuple[int, int]], runs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What the runs leave of the pieces of memory; both are sorted.

    ValueError where they overlap, or reach beyond the pieces.
    """
    gaps = []
    left = iter(runs)
    run = next(left, None)
    for start, end in wanted:
        at = start
        while run is not None and run[0] < end:
            if run[0] < at:
                raise ValueError(
                    "the plan writes a byte twice"
                    if at > start
                    else "the plan writes beside the tensors"
                )
            if run[1] > end:
                raise ValueError("the plan writes beside the tensors")
            if run[0] > at:
                gaps.append((at, run[0]))
            at = run[1]
            run = next(left, None)
        if at < end:
            gaps.append((at, end))
    if run is not None:
        raise ValueError("the plan writes beside the tensors")
    return gaps


class _Powers:
    """Distinguishes sets of bytes, in which some may be several times, without going from byte to
    byte.

    A set is the polynomial with one x^n for each byte at n, times x - 1, taken at one x modulo a
    prime. Two that differ have the same value at no more of the 2^127 places than their degree:
    with addresses up to 2^47, one chance in 2^80 to miss it.
    """

    MODULUS = (1 << 127) - 1
    _X = 0x9E3779B97F4A7C15F39CC0605CEDC835 % MODULUS  # digits of the golden ratio

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], int] = {}
        self._runs: dict[int, int] = {}

    def of(self, some: Lines) -> int:
        value = self._run(some.nbytes) * pow(self._X, some.dst, self.MODULUS)
        for count, step in zip(some.counts, some.dst_steps, strict=True):
            value = value * self._sum(count, step) % self.MODULUS
        return value

    def _run(self, nbytes: int) -> int:
        if nbytes not in self._runs:
            self._runs[nbytes] = pow(self._X, nbytes, self.MODULUS) - 1
        return self._runs[nbytes]

    def _sum(self, count: int, step: int) -> int:
        """Of `count` powers that are a step apart."""
        if (count, step) not in self._sums:
            one = pow(self._X, step, self.MODULUS)
            last = pow(one, count, self.MODULUS)
            self._sums[count, step] = (last - 1) * pow(one - 1, -1, self.MODULUS) if step else count
        return self._sums[count, step]


def _merge(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted pieces of memory, with those that touch each other joined."""
    merged: list[tuple[int, int]] = []
    for start, end in pieces:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged
