"""The report of `python -m benchmarks.peers`: the tables of docs/explanation/peers-figures.md, from
what was found.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

import click

from benchmarks.peers.candidates import CANDIDATES, OURS, REFERENCE
from benchmarks.peers.pairing import Loads, loads_of
from benchmarks.peers.results import Found, Turn, turns_of
from benchmarks.peers.side import READER, SERVICE, SOURCE
from engine_registry.schema.printable import count

BEGIN = "<!-- Tables: `python -m benchmarks.peers report --page` writes them. -->"
END = "<!-- End of the tables. -->"
_MESSAGE = 160  # characters of an error's message
_Rows = list[tuple[str, ...]]


class PageUnmarked(click.ClickException):
    """The page has no place for the tables."""


def page_with(page: str, written: str) -> str:
    """The page with these tables between its marks, instead of those that are there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PageUnmarked(f"the page lacks {END if begin else BEGIN}")
    return f"{before}{BEGIN}\n\n{written}\n{END}{after}"


def tables(everything: Mapping[str, Found]) -> str:
    """Markdown, of the parts that were measured."""
    sections = [
        text
        for part, write in _SECTIONS.items()
        if part in everything
        for text in write(everything[part])
    ]
    return "\n".join([*_measured_on(everything), *sections, *_not_done(everything)])


def _measured_on(everything: Mapping[str, Found]) -> Iterable[str]:
    rows = []
    for part, document in everything.items():
        machine, turns = document["machine"], list(turns_of(document))
        rounds = len({turn.number for turn in turns})
        rows.append((part, machine["date"], str(rounds), f"{document['settings']['scale']:g}"))
    yield _section("What was measured", ("part", "date", "rounds", "scale of the sets"), rows)
    machine = next(iter(everything.values()), {}).get("machine", {})
    yield _table(
        ("machine and versions", ""),
        [(name, str(value)) for name, value in machine.items() if name != "date"],
    )


def _compared(document: Found) -> Iterable[tuple[str, str, str, Mapping[str, Loads]]]:
    """The place, the set, its size, and the loads by candidate, where there are some."""
    for (place, tensor_set), turns in _grouped(document):
        if found := loads_of(turns, OURS):
            yield place, tensor_set, _size(turns[0]), found


def _loopback(document: Found) -> Iterable[str]:
    for _, tensor_set, size, found in _compared(document):
        rows = [
            (
                name,
                f"{1e3 * one.seconds:,.0f}",
                f"{one.gb_per_s:.2f}",
                f"{one.to_reference:.2f}",
                _ratio(one.to_ours),
                f"{1e3 * one.first_s:,.0f}",
                f"{one.source_cpu_s:.2f}",
                f"{one.reader_cpu_s:.2f}",
                f"{one.source_nbytes / 1e6:,.0f}",
                f"{one.reader_nbytes / 1e6:,.0f}",
            )
            for name, one in _by_speed(found)
        ]
        yield _section(
            f"Loopback: {tensor_set}, {size}",
            (
                "candidate",
                "ms",
                "GB/s",
                f"÷ {REFERENCE}",
                f"÷ {OURS}",
                "first, ms",
                "CPU s/GB, source",
                "CPU s/GB, reader",
                "MB, source",
                "MB, reader",
            ),
            rows,
        )


def _hosts(document: Found) -> Iterable[str]:
    for place, _, size, found in _compared(document):
        rows = [
            (
                name,
                f"{1e3 * one.seconds:,.0f}",
                f"{one.gb_per_s * 8:.2f}",
                f"{one.to_reference:.2f}",
                _ratio(one.to_ours),
                f"{1e3 * one.first_s:,.0f}",
            )
            for name, one in _by_speed(found)
        ]
        yield _section(
            f"Hosts, {place}: {size}",
            ("candidate", "ms", "Gbit/s", f"÷ {REFERENCE}", f"÷ {OURS}", "first, ms"),
            rows,
        )


def _kills(document: Found) -> Iterable[str]:
    rows: _Rows = []
    for name, turns in _by_candidate(document):
        errors = [turn.found for turn in turns if "seconds" in turn.found]
        if not errors:
            continue
        times = [one["seconds"] for one in errors]
        last = errors[-1]
        rows.append(
            (
                name,
                f"{statistics.median(times):.2f}",
                f"{max(times):.2f}",
                f"{len(errors)} of {len(turns)}",
                f"`{last['type']}`",
                _text(last["message"]),
            )
        )
    yield _section(
        "From a kill of the source to the error at the reader",
        ("candidate", "median, s", "most, s", "errors", "type", "message of the last"),
        rows,
    )


def _idle(document: Found) -> Iterable[str]:
    rows = [
        (name, *(_share(turns, role) for role in (SOURCE, READER, SERVICE)))
        for name, turns in _by_candidate(document)
        if any(turn.found for turn in turns)
    ]
    yield _section("Idle CPU, in % of a core", ("candidate", SOURCE, READER, SERVICE), rows)


def _not_done(everything: Mapping[str, Found]) -> Iterable[str]:
    """Of each candidate: what it is, what it cannot do, and what failed here."""
    failed: dict[str, list[str]] = {}
    for part, document in everything.items():
        for (place, tensor_set), turns in _grouped(document):
            for name, some in _by_name(turns):
                errors = [turn.error for turn in some if turn.error]
                if errors:
                    failed.setdefault(name, []).append(
                        f"{part}, {place}, {tensor_set}, {len(errors)} of {len(some)}: "
                        f"`{errors[-1]['type']}` {_text(errors[-1]['message'])}"
                    )
    rows = [
        (name, one.title, one.lacks, "; ".join(failed.get(name, [])))
        for name, one in CANDIDATES.items()
    ]
    yield _section(
        "What each is, cannot do, and failed at",
        ("candidate", "is", "cannot do", "failed here"),
        rows,
    )


_SECTIONS: dict[str, Callable[[Found], Iterable[str]]] = {
    "loopback": _loopback,
    "hosts": _hosts,
    "kills": _kills,
    "idle": _idle,
}


def _grouped(document: Found) -> list[tuple[tuple[str, str], list[Turn]]]:
    """The turns by place and set, in the order in which these were measured."""
    groups: dict[tuple[str, str], list[Turn]] = {}
    for turn in turns_of(document):
        groups.setdefault((turn.place, turn.tensor_set), []).append(turn)
    return list(groups.items())


def _by_candidate(document: Found) -> list[tuple[str, list[Turn]]]:
    return _by_name(turns_of(document))


def _by_name(turns: Iterable[Turn]) -> list[tuple[str, list[Turn]]]:
    """In the order of the table of candidates."""
    order = list(CANDIDATES)
    ordered = sorted(turns, key=lambda turn: order.index(turn.candidate))
    return [(name, list(some)) for name, some in groupby(ordered, lambda turn: turn.candidate)]


def _by_speed(found: Mapping[str, Loads]) -> list[tuple[str, Loads]]:
    return sorted(found.items(), key=lambda item: item[1].to_reference)


def _share(turns: Sequence[Turn], role: str) -> str:
    """Empty where there is no such side."""
    shares = [turn.found["shares"][role] for turn in turns if role in turn.found.get("shares", {})]
    return f"{100 * statistics.median(shares):.1f}" if shares else ""


def _size(turn: Turn) -> str:
    return f"{count(turn.count, 'tensor')}, {turn.nbytes / 1e6:,.0f} MB"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _text(message: str) -> str:
    """In a cell of a table."""
    cut = message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}…"
    return cut.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _section(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return f"### {title}\n\n{_table(columns, rows)}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
