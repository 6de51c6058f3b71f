"""Medians of what was measured, beside the goals, and their tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.updates.candidates import DELTA, FULL, TITLES
from benchmarks.updates.rounds import HERE, Sample

_GOAL_SHARE = 0.02
_ENCODE_SHARE = "2%"
_CODEC = ("memcpy", "encode", "apply", "columns")


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One for each place, share and candidate. Ratios are medians of those of single rounds."""
    found = []
    for place, share in _unique([(one.place, one.share) for one in samples]):
        some = [one for one in samples if (one.place, one.share) == (place, share)]
        full = {one.number: one.seconds for one in some if one.candidate == FULL}
        for name in TITLES:
            mine = [one for one in some if one.candidate == name]
            ratios = [one.seconds / full[one.number] for one in mine]
            parts = ("noticed_s", "load_s", "transfer_s", "digest_s")
            row: dict[str, Any] = {
                "place": place,
                "changed": share,
                "candidate": name,
                "rounds": len(mine),
                "seconds": _median(one.seconds for one in mine),
                "least_s": min(one.seconds for one in mine),
                "most_s": max(one.seconds for one in mine),
                "to_full": _median(ratios),
                "bytes_to_weights": _median(
                    one.reader["nbytes"] / one.weights_nbytes for one in mine
                ),
                "sent_to_weights": _median(one.sent_nbytes / one.weights_nbytes for one in mine),
                "send_s": _median(one.send_s for one in mine),
                "send_to_memcpy": _median(one.send_s / one.memcpy_s for one in mine),
                "peak_to_weights": _median(one.peak_nbytes / one.weights_nbytes for one in mine),
                "load": _median(one.load for one in mine),
            }
            for part in parts:
                if part in mine[0].reader:
                    row[part] = _median(one.reader[part] for one in mine)
            found.append(row)
    return found


def goals(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Each with what was found; without a value where it was not measured."""
    found = {(one["place"], one["changed"], one["candidate"]): one for one in document["rows"]}
    here = found.get((HERE, _GOAL_SHARE, DELTA), {})
    linked: dict[str, Any] = next(
        (
            one
            for (place, share, name), one in found.items()
            if (share, name) == (_GOAL_SHARE, DELTA) and place != HERE
        ),
        {},
    )
    many, memory = document["many"], document["memory"]
    return [
        {"figure": figure, "goal": goal, "value": value}
        for figure, goal, value in (
            ("bytes a step ÷ weights, 2 % changed", 0.10, here.get("bytes_to_weights")),
            ("the same, as the link counts them", 0.10, linked.get("sent_to_weights")),
            ("step ÷ full load on the slow link", 0.25, linked.get("to_full")),
            (
                "encode on one core, s a GB",
                0.5,
                document["codec"].get(f"{_ENCODE_SHARE}_encode_s_per_gb"),
            ),
            ("the trainer's stall ÷ memcpy", 1.2, here.get("send_to_memcpy")),
            ("loads that began again", 0, many.get("retries")),
            ("memory at publish ÷ what was announced", 1.0, memory.get("published_to_announced")),
        )
    ]


def tables(document: dict[str, Any]) -> str:
    """As Markdown."""
    found: list[str] = []
    for place, share in _unique([(one["place"], one["changed"]) for one in document["rows"]]):
        some = [one for one in document["rows"] if (one["place"], one["changed"]) == (place, share)]
        load = statistics.median(one["load"] for one in some)
        found += _table(
            f"{place}, {_percent(share)} changed, the machine's load {load:.0f}",
            ("candidate", "step, s", "least", "most", "÷ full load", "bytes ÷ weights", "call, s"),
            [
                (
                    TITLES[one["candidate"]],
                    *(f"{one[name]:.3f}" for name in ("seconds", "least_s", "most_s")),
                    f"{one['to_full']:.2f}",
                    f"{one['bytes_to_weights']:.4f}",
                    f"{one['send_s']:.3f}",
                )
                for one in some
            ],
        )
    found += _table(
        "Where the time of a step by a delta goes",
        ("place", "changed", "call, s", "seen after, s", "load, s", "of it deltas and digests, s"),
        [
            (
                one["place"],
                _percent(one["changed"]),
                *(f"{one[name]:.3f}" for name in ("send_s", "noticed_s", "load_s", "digest_s")),
            )
            for one in document["rows"]
            if one["candidate"] == DELTA
        ],
    )
    codec = document["codec"]
    found += _table(
        "On one core, s for each GB of weights",
        ("changed", *_CODEC),
        [
            (share, *(f"{codec[f'{share}_{name}_s_per_gb']:.3f}" for name in _CODEC))
            for share in dict.fromkeys(name.partition("_")[0] for name in codec)
        ],
    )
    if many := document["many"]:
        found += _table(
            "Snapshots one after the other",
            ("of", "number", "readers", "loads", "began again", "wrong tensors"),
            [
                (
                    f"{many['weights_nbytes'] / 1e6:.0f} MB, {_percent(many['share'])} changed",
                    *(
                        f"{many[name]:,}"
                        for name in ("updates", "readers", "loads", "retries", "wrong")
                    ),
                )
            ],
        )
    found += _table(
        "Goals",
        ("figure", "goal", "found"),
        [(one["figure"], f"{one['goal']:g}", _value(one["value"])) for one in document["goals"]],
    )
    return "\n".join(found)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"### {title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""]


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _value(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _unique(pairs: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return list(dict.fromkeys(pairs))


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 6)
