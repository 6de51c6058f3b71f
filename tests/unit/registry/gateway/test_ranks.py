"""SGLang numbers its seeds by tp rank: with the pp rank beside it, that is a world rank."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine_registry.errors import InvalidField
from engine_registry.gateway.ranks import parse_rank, parse_world_size, world_rank
from engine_registry.gateway.sglang import parse_registration
from engine_registry.schema.keys import MAX_RANKS


def rank_of(**ranks: Any) -> int:
    info = {"session_id": "10.0.0.7:15001", "weights_info_dict": {"w": [4096, 10, 2]}}
    body = {"transfer_engine_info": info, **ranks}
    return parse_registration(json.dumps(body).encode()).rank


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ({"tp_rank": 1, "pp_rank": 1, "tp_size": 2}, 3),
        ({"tp_rank": 0, "pp_rank": 2, "tp_size": 4}, 8),
        ({"tp_rank": 1, "pp_rank": 0, "tp_size": 2}, 1),
        ({"tp_rank": 1, "pp_rank": 0}, 1),
        ({"tp_rank": 1, "tp_size": 2}, 1),
        ({"tp_rank": 1, "pp_rank": None, "tp_size": None}, 1),
        ({"rank": 5, "tp_rank": 1, "pp_rank": 1, "tp_size": 2}, 5),
    ],
)
def test_ranks_of_a_seed_are_world_ranks(ranks: dict[str, Any], wanted: int) -> None:
    assert rank_of(**ranks) == wanted


def test_all_ranks_of_both_axes_are_different() -> None:
    ranks = [rank_of(tp_rank=tp, pp_rank=pp, tp_size=4) for pp in range(3) for tp in range(4)]
    assert ranks == list(range(12))


@pytest.mark.parametrize(
    ("ranks", "field"),
    [
        ({"tp_rank": 1, "pp_rank": 1}, "tp_size"),
        ({"tp_rank": 2, "pp_rank": 1, "tp_size": 2}, "tp_rank"),
        ({"tp_rank": 2, "tp_size": 2}, "tp_rank"),
        ({"tp_rank": 0, "pp_rank": MAX_RANKS - 1, "tp_size": 2}, "pp_rank"),
        ({"tp_rank": 0, "pp_rank": -1, "tp_size": 2}, "pp_rank"),
        ({"tp_rank": 0, "pp_rank": 1, "tp_size": 0}, "tp_size"),
    ],
)
def test_ranks_that_make_no_world_rank_are_refused(ranks: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        rank_of(**ranks)
    assert caught.value.details["field"] == field


def test_what_is_missing_for_a_world_rank_is_named() -> None:
    with pytest.raises(InvalidField, match="pp_rank 1 is given without tp_size") as caught:
        world_rank(0, 1, None)
    assert caught.value.remedy == "send tp_size, too, or the world rank as `rank`"


@pytest.mark.parametrize(
    "text", [None, "", "-1", "x", "1.0", "+1", " 1", "1e3", "٣", "9" * 10, "0x1"]
)
def test_a_rank_of_a_query_is_a_whole_number_from_zero(text: str | None) -> None:
    assert parse_rank("0") == 0
    with pytest.raises(InvalidField, match=r"rank .*: give \?rank=N"):
        parse_rank(text)


def test_a_world_size_of_a_query_may_be_left_out_but_not_be_wrong() -> None:
    assert (parse_world_size(None), parse_world_size("8")) == (None, 8)
    for text in ("", "0", "-1", "x", "100001"):
        with pytest.raises(InvalidField, match="world_size"):
            parse_world_size(text)
