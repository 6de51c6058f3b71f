"""What every engine does, the real one does over RDMA: the suite of `tests/contract` on a host."""

from __future__ import annotations

import pytest

from tests.rdma.conftest import Say
from tests.rdma.guest import Guest

pytestmark = pytest.mark.rdma

PAUSE_S = 600.0  # between two results


def test_mooncake_over_rdma_passes_the_suite_of_every_engine(guests: list[Guest], say: Say) -> None:
    guest = guests[0]
    program = guest.start(
        "pytest",
        *("-c", "/project/pyproject.toml", "/project/tests/contract"),
        *("-k", "rdma"),
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
