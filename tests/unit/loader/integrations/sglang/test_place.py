"""World ranks and axes of a process of SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.integrations.sglang.place import expert_of, place_of


class Parallel(SimpleNamespace):
    """Raises as SGLang's context does for what was not set up."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} has not been written in this process")


def parallel(**values: int) -> Parallel:
    return Parallel(**{"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1} | values)


def test_ranks_are_counted_over_stages_and_their_tensor_parallel_groups() -> None:
    places = [
        place_of(parallel(tp_rank=tp, tp_size=4, pp_rank=pp, pp_size=2))
        for pp in range(2)
        for tp in range(4)
    ]
    assert [place.rank for place in places] == list(range(8))
    assert {place.world_size for place in places} == {8}
    assert places[5].topology == {"tp": (1, 4), "pp": (1, 2)}


def test_axes_inside_of_the_group_are_stated_where_they_split_otherwise() -> None:
    split = parallel(
        tp_rank=3,
        tp_size=4,
        moe_ep_rank=1,
        moe_ep_size=2,
        moe_tp_rank=1,
        moe_tp_size=2,
        attn_tp_rank=3,
        attn_tp_size=4,
        moe_dp_rank=0,
        moe_dp_size=1,
    )
    assert place_of(split).topology == {"tp": (3, 4), "pp": (0, 1), "ep": (1, 2), "moe_tp": (1, 2)}


def test_all_ranks_of_a_group_state_the_same_axes() -> None:
    ranks = [
        place_of(
            parallel(tp_rank=rank, tp_size=4, moe_ep_rank=rank % 2, moe_ep_size=2)
        ).topology.keys()
        for rank in range(4)
    ]
    assert all(axes == ranks[0] for axes in ranks)


def test_experts_that_are_not_split_have_one_place() -> None:
    assert expert_of(parallel()) == (0, 1)
    assert expert_of(parallel(moe_ep_rank=1, moe_ep_size=2)) == (1, 2)


@pytest.mark.parametrize("missing", ["tp_rank", "tp_size", "pp_rank", "pp_size"])
def test_a_release_without_the_main_axes_is_an_error_and_not_rank_zero(missing: str) -> None:
    context = parallel()
    delattr(context, missing)
    with pytest.raises(RuntimeError, match=missing):
        place_of(context)
