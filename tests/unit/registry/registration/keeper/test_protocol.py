"""Messages over a pipe: what is written is what is read, and a pipe that ends early gives no half a
message.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_registry.registration.keeper.protocol import (
    Frame,
    FrameBuffer,
    encode_frame,
    read_frame,
)

MESSAGES = st.dictionaries(
    st.text(max_size=10).filter(lambda name: name != "payloads"),
    st.none() | st.integers() | st.text(max_size=10) | st.lists(st.integers(), max_size=3),
    max_size=4,
)
FRAMES = st.tuples(MESSAGES, st.lists(st.binary(max_size=50), max_size=3))


def written(*frames: tuple[dict[str, Any], list[bytes]]) -> bytes:
    return b"".join(encode_frame(message, payloads) for message, payloads in frames)


@given(st.lists(FRAMES, max_size=4))
def test_frames_are_read_as_they_were_written_and_then_the_end(
    frames: list[tuple[dict[str, Any], list[bytes]]],
) -> None:
    pipe = io.BytesIO(written(*frames))
    for message, payloads in frames:
        assert read_frame(pipe) == Frame(message, tuple(payloads))
    assert read_frame(pipe) is None


@given(st.lists(FRAMES, max_size=4), st.integers(1, 40))
def test_frames_that_come_in_pieces_are_given_whole_and_in_order(
    frames: list[tuple[dict[str, Any], list[bytes]]], step: int
) -> None:
    data, buffer = written(*frames), FrameBuffer()
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    assert [frame for piece in pieces for frame in buffer.feed(piece)] == [
        Frame(message, tuple(payloads)) for message, payloads in frames
    ]


@pytest.mark.parametrize("payloads", [[], [b"abc\n"], [b"", b"\n{}", b"x" * 10]])
def test_a_frame_cut_off_anywhere_is_the_end_of_the_pipe(payloads: list[bytes]) -> None:
    whole = written(({"op": "update", "key": "/engines/a/0"}, payloads))
    assert read_frame(io.BytesIO(whole)) is not None
    for length in range(len(whole)):
        assert read_frame(io.BytesIO(whole[:length])) is None, length


def test_a_path_that_is_no_text_reaches_the_other_end_as_it_is() -> None:
    message = {"etcd": {"cacert": "/certs/\udcff.pem"}, "why": "/engines/\udce4/0 is damaged"}
    assert read_frame(io.BytesIO(encode_frame(message))) == Frame(message)
