"""The goals, and whether they are met. A goal is a figure and the most that it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    figure: str
    what: str
    most: float


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float | None  # None: not measured

    @property
    def said(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.value <= self.goal.most else "not met"


GOALS = (
    *(Goal(f"join_requests_over_{name}", f"requests a join, over {name}", 20) for name in "RIN"),
    *(Goal(f"join_kb_over_{name}", f"kB of etcd a join, over {name}", 32) for name in "RIN"),
    Goal("join_bytes_exponent_in_N", "exponent of the bytes of all joins in N", 1.05),
    Goal("claim_etcd_ms", "ms of etcd CPU a claim, beside the most siblings", 5),
    Goal("sockets_a_host", "sockets to etcd of a host of 8 ranks that serve", 2),
    Goal("watcher_ms", "ms of a watcher's CPU for a rank replaced, of the most ranks", 1.5),
    Goal("list_s", "seconds of a list of all ranks", 0.3),
    Goal("chain_ratio", "1,000 receivers to 8, in the model", 1.5),
    Goal("loss_p50_ms", "ms until a loss is seen, p50", 5),
    Goal("loss_p99_ms", "ms until a loss is seen, p99", 50),
)


def verdicts(figures: Mapping[str, float]) -> list[Verdict]:
    return [Verdict(goal, figures.get(goal.figure)) for goal in GOALS]
