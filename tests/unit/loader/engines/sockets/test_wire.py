"""What engines say before they read: it comes back as it was, and nothing else is taken for it."""

from __future__ import annotations

import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.engines.sockets import wire
from engine_loader.engines.sockets.neighbour import Place
from engine_loader.engines.sockets.wire import Answer, Contact, Hello, NotOurs, Welcome

CHALLENGES = st.binary(min_size=32, max_size=32)
WORDS = st.integers(0, (1 << 64) - 1)
PLACES = st.builds(
    Place,
    st.uuids().map(str),
    WORDS,
    st.integers(1, (1 << 32) - 1),
    WORDS,
    st.binary(min_size=16, max_size=16),
)


@given(st.booleans(), CHALLENGES)
def test_a_hello_comes_back(demands_token: bool, challenge: bytes) -> None:
    packed = Hello(demands_token, challenge).packed()
    assert len(packed) == wire.HELLO_NBYTES
    assert Hello.read(packed) == (demands_token, challenge)


@given(CHALLENGES, CHALLENGES)
def test_an_answer_comes_back(challenge: bytes, given_proof: bytes) -> None:
    packed = Answer(challenge, given_proof).packed()
    assert len(packed) == wire.ANSWER_NBYTES
    assert Answer.read(packed) == (challenge, given_proof)


@given(st.booleans(), CHALLENGES, PLACES | st.none())
def test_a_welcome_comes_back(taken: bool, given_proof: bytes, place: Place | None) -> None:
    packed = Welcome(taken, given_proof, place).packed()
    assert len(packed) == wire.WELCOME_NBYTES
    assert Welcome.read(packed) == (taken, given_proof, place)


@given(st.binary(min_size=wire.WELCOME_NBYTES, max_size=wire.WELCOME_NBYTES))
def test_any_bytes_are_some_welcome(packed: bytes) -> None:
    assert isinstance(Welcome.read(packed), Welcome)


@given(st.binary(min_size=wire.HELLO_NBYTES, max_size=wire.HELLO_NBYTES))
def test_a_hello_begins_with_the_magic(packed: bytes) -> None:
    with pytest.raises(NotOurs, match="no engine of the protocol socket"):
        Hello.read(packed)


def test_a_proof_is_of_the_token_the_side_both_challenges_and_the_address() -> None:
    token, source, reader, other = (secrets.token_bytes(32) for _ in range(4))
    contact = Contact("10.0.0.7:1234", source, reader)
    given_proof = contact.proof(token, b"source")
    assert contact.proves(token, b"source", given_proof)
    assert not contact.proves(other, b"source", given_proof)
    assert not contact.proves(token, b"reader", given_proof)
    for another in (
        contact._replace(source=other),
        contact._replace(reader=other),
        contact._replace(session_id="10.0.0.8:1234"),
    ):
        assert not another.proves(token, b"source", given_proof)
    assert not contact.proves(token, b"source", wire.NO_PROOF)
