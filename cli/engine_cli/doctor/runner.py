"""Runs checks at the same time, each in a separate thread and for a limited time. Used by
`engines doctor`.

A check that raises is a finding, and so is one that takes too long: its thread is a daemon, and is
left behind.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from engine_cli.doctor.finding import Finding, described, duration, fail, skipped

A = TypeVar("A")
T = TypeVar("T")
_TIDY_S = 1.0


class Skip(Exception):
    """Raised by a check that has nothing to look at; says why."""


@dataclass(frozen=True)
class Check:
    """`name` is the finding's if the check yields none itself; `late` says what to do if it takes
    longer than `limit_s`.
    """

    name: str
    run: Callable[[], Iterable[Finding]]
    limit_s: float
    late: str
    tidies: bool = (
        False  # it must not be left half-way: waited for, briefly, if everything is interrupted
    )


@dataclass
class _Run:
    check: Check
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(
            target=self._run, name=f"doctor {self.check.name}", daemon=True
        )

    def _run(self) -> None:
        try:
            for finding in self.check.run():
                self.findings.append(finding)
        except Skip as exc:
            self.findings.append(skipped(self.check.name, str(exc)))
        except Exception as exc:  # noqa: BLE001  it is raised by the caller's thread
            what, mend = described(exc)
            if not _is_ours(exc):
                what, mend = (
                    f"unexpected {type(exc).__name__}: {what}",
                    "please report it, with this line",
                )
            self.findings.append(fail(self.check.name, what, mend or "see the other findings"))

    def result(self) -> list[Finding]:
        seen = list(self.findings)  # of a thread that still runs, what it has found so far
        if not self.thread.is_alive():
            return list(self.findings)
        return [
            *seen,
            fail(
                self.check.name, f"no answer within {duration(self.check.limit_s)}", self.check.late
            ),
        ]


def run_all(checks: Sequence[Check]) -> list[Finding]:
    """The findings in the order of the checks, at the latest when the longest limit is over."""
    runs = [_Run(check) for check in checks]
    began = time.monotonic()
    for each in runs:
        each.thread.start()
    try:
        for each in runs:
            each.thread.join(max(0.0, began + each.check.limit_s - time.monotonic()))
    except BaseException:
        for each in runs:
            if each.check.tidies:
                each.thread.join(_TIDY_S)
        raise
    return [finding for each in runs for finding in each.result()]


def at_once(call: Callable[[A], T], items: Sequence[A]) -> list[T]:
    """`map` in threads, all at the same time.

    If some raise, the first of these errors is raised at the end.
    """
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}

    def run(number: int) -> None:
        try:
            results[number] = call(items[number])
        except Exception as exc:  # noqa: BLE001  it is raised by the caller's thread
            errors[number] = exc

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(items))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in sorted(errors):
        raise errors[number]
    return [results[number] for number in range(len(items))]


def within(limit_s: float, call: Callable[[], T]) -> T:
    """For a call that has no time limit itself, such as a look-up of a name:

    TimeoutError when the time is over.
    """
    results: list[T] = []
    errors: list[Exception] = [TimeoutError(f"no answer within {duration(limit_s)}")]

    def run() -> None:
        try:
            results.append(call())
        except Exception as exc:  # noqa: BLE001  it is raised by the caller's thread
            errors.append(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    raise errors[-1]


class Once(Generic[T]):
    """A value that several checks need: the first that asks gets it, the others wait for it.

    An error is everybody's.
    """

    def __init__(self, get: Callable[[], T]) -> None:
        self._get = get
        self._lock = threading.Lock()
        self._value: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._value:
                try:
                    self._value.append(self._get())
                except Exception as exc:
                    self._error = exc
                    raise
            return self._value[0]


def _is_ours(exc: BaseException) -> bool:
    return any(
        kind.__module__ in ("engine_registry.errors", "engine_loader.errors")
        for kind in type(exc).__mro__
    )
