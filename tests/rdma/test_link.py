"""The hosts themselves: what the other tests take for granted."""

from __future__ import annotations

import pytest

from tests.rdma.guest import Guest
from tests.rdma.switch import Switch

pytestmark = pytest.mark.rdma


def test_two_hosts_reach_each_other_over_rdma_and_nothing_else(
    guests: list[Guest], switch: Switch
) -> None:
    one, two = guests
    before = switch.forwarded
    command = "ibv_rc_pingpong -d rxe0 -g 1 -n 20 -s 4096"
    server = two.shell_program(command)
    again = f"for try in 1 2 3 4 5 6; do {command} {two.address} && exit; sleep 1; done; exit 1"
    client = one.shell(again)  # until the server listens
    assert "20 iters" in client
    assert "20 iters" in server.finish()[0]
    assert switch.forwarded - before >= 2 * 20
