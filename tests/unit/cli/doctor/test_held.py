"""What `engines doctor` says of memory that keepers of this host hold."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from engine_cli.doctor.finding import Status
from engine_cli.doctor.held import judge_held
from engine_registry import Kept
from engine_registry.schema.moment import utc

UNTIL = utc(datetime.now(timezone.utc) + timedelta(hours=5, minutes=5))


def kept(rank: int, held_until: str = UNTIL, pid: int = 4712, sharers: int = 0) -> Kept:
    name, devices = bytes(16), ("GPU-1",)
    key = f"/engines/qwen/{rank}"
    return Kept(name, key, "0" * 32, pid, devices, 7_600_000_000, held_until, 290.0, sharers)


def test_memory_that_is_held_is_to_be_looked_at_with_how_to_free_it() -> None:
    one, other = judge_held([kept(1, sharers=2), kept(3, ""), kept(0, pid=0)])
    assert (one.status, one.check) == (Status.WARN, "memory.held")
    assert one.what == "qwen/0 holds 7.6 GB on GPU-1: its process has ended; 5 h left"
    assert one.mend.endswith("engines release qwen --held --rank 0")
    assert "qwen/1 holds 7.6 GB on GPU-1, shared by 2 processes: its process" in other.what
    assert other.mend.endswith("--held --rank 1, or end its keeper: kill -KILL 4712")


def test_memory_of_ranks_that_live_is_no_finding() -> None:
    (only,) = judge_held([kept(0, "")])
    assert (only.status, only.mend) == (Status.OK, "")
