"""What a check has found. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from engine_cli.wording import in_options, said
from engine_registry.errors import EngineRegistryError


class Status(str, Enum):
    """What the reader of the finding should do."""

    OK = "ok"  # nothing
    WARN = "warn"  # it works; look at it in daylight
    FAIL = "fail"  # mend it: something does not work, or is about to stop
    SKIPPED = "skipped"  # nothing was looked at; `what` says why


@dataclass(frozen=True)
class Finding:
    """`check` is stable, `what` says what was seen, `mend` what to do about it."""

    check: str
    status: Status
    what: str
    mend: str = ""

    def to_json(self) -> dict[str, str]:
        return {
            "check": self.check,
            "status": self.status.value,
            "what": self.what,
            "mend": self.mend,
        }


def ok(check: str, what: str) -> Finding:
    return Finding(check, Status.OK, what)


def warn(check: str, what: str, mend: str) -> Finding:
    return Finding(check, Status.WARN, what, mend)


def fail(check: str, what: str, mend: str) -> Finding:
    return Finding(check, Status.FAIL, what, mend)


def skipped(check: str, what: str) -> Finding:
    return Finding(check, Status.SKIPPED, what)


def described(exc: BaseException) -> tuple[str, str]:
    """What happened and, for an error of ours, what to do; in terms of the command line."""
    if isinstance(exc, EngineRegistryError):
        return in_options(exc.what, exc.details), in_options(exc.remedy, exc.details)
    return said(exc) or type(exc).__name__, ""


def failure(exc: BaseException) -> dict[str, str]:
    """The same, as a fact of the probe process."""
    what, mend = described(exc)
    return {"error": what, "mend": mend}


def duration(seconds: float) -> str:
    if seconds < 0.01:
        return f"{1000 * seconds:.1f} ms"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
