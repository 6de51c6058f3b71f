from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.gateway.admission import Places, client_of


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8:0:0:ffff::", "2001:db8::/64"),
        ("2001:db8:0:1::1", "2001:db8:0:1::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_client_is_an_ipv4_address_or_a_network_of_ipv6(host: str, client: str) -> None:
    assert client_of(host) == client


def test_of_a_client_with_too_many_the_one_that_has_waited_longest_loses_its_place() -> None:
    places = Places[int](100, 3)
    assert places.wait(9, "other") == []
    assert [places.wait(number, "client") for number in range(5)] == [[], [], [], [0], [1]]
    assert places.wait(2, "client") == []  # it has been answered, and waits anew
    assert places.wait(5, "client") == [3]


def test_of_too_many_in_all_the_one_that_has_waited_longest_loses_its_place() -> None:
    places = Places[int](3, 100)
    assert [places.wait(number, str(number)) for number in range(5)] == [[], [], [], [0], [1]]


def test_a_connection_that_is_beyond_both_limits_loses_its_place_once() -> None:
    places = Places[int](1, 1)
    assert [places.wait(number, "client") for number in range(2)] == [[], [0]]


def test_requests_keep_their_places_and_an_eighth_is_left_for_those_that_wait() -> None:
    places = Places[int](100, 16)
    assert [places.wait(number, "client") for number in range(16)] == [[]] * 16
    assert all(places.begin(number) for number in range(16))
    assert [places.wait(number, "client") for number in range(16, 19)] == [[], [], [16]]
    assert not places.begin(17)
    assert places.wait(0, "client") == [17]  # an answered one takes the place of those that wait
    assert places.begin(18)


def test_requests_begin_up_to_their_limit_and_again_when_one_has_ended() -> None:
    places = Places[int](2, 2)
    for number in range(2):
        places.wait(number, str(number))
        assert places.begin(number)
    places.wait(2, "2")
    assert not places.begin(2)
    places.leave(0)
    assert places.begin(2)


KINDS = st.sampled_from(["come", "begin", "answer", "leave"])
STEPS = st.lists(st.tuples(KINDS, st.integers(0, 99)))


@given(st.integers(1, 20), st.integers(1, 20), STEPS)
def test_whatever_happens_limits_hold_and_each_new_connection_is_taken_in(
    total: int, each: int, steps: list[tuple[str, int]]
) -> None:
    places = Places[int](total, each)
    waiting: dict[int, str] = {}
    busy: dict[int, str] = {}

    def wait(number: int, client: str) -> None:
        waiting[number] = client
        for lost in places.wait(number, client):
            assert lost != number
            del waiting[lost]

    for count, (step, chosen) in enumerate(steps):
        if step == "come":
            wait(count, "abc"[chosen % 3])
        elif step == "begin" and waiting:
            number = sorted(waiting)[chosen % len(waiting)]
            if places.begin(number):
                busy[number] = waiting.pop(number)
        elif step == "answer" and busy:
            number = sorted(busy)[chosen % len(busy)]
            wait(number, busy.pop(number))
        elif step == "leave" and waiting | busy:
            number = sorted(waiting | busy)[chosen % len(waiting | busy)]
            places.leave(number)
            waiting.pop(number, None)
            busy.pop(number, None)
        assert len(busy) <= total
        assert len(busy | waiting) <= total + max(total // 8, 1)
        requests, own = Counter(busy.values()), Counter((busy | waiting).values())
        assert all(number <= each for number in requests.values())
        assert all(number <= each + max(each // 8, 1) for number in own.values())
