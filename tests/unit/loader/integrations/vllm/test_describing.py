"""What vLLM's configuration becomes: a place among ranks, an instance, and an identity."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.vllm.describing import (
    Ranks,
    cache_entry_of,
    identity_of,
    is_draft,
    seat_of,
)
from engine_registry import ModelIdentity

CONFIG = IntegrationConfig()
RANKS = Ranks(tp=(1, 2), pp=(1, 2), nonce="abcd")


class HfConfig:
    _commit_hash: str | None = None

    def __init__(self, **values: Any) -> None:
        self.values = values

    def to_dict(self) -> dict[str, Any]:
        return self.values


def a_model(**changes: Any) -> Any:
    given = {
        "served_model_name": "qwen",
        "model": "/models/qwen",
        "revision": None,
        "dtype": "torch.bfloat16",
        "quantization": None,
        "hf_config": HfConfig(hidden_size=64),
    }
    return SimpleNamespace(**{**given, **changes})


def a_vllm(model: Any = None, speculative: Any = None, **parallel: Any) -> Any:
    given = {"data_parallel_size": 1, "data_parallel_index": 0}
    return SimpleNamespace(
        model_config=model or a_model(),
        speculative_config=speculative,
        parallel_config=SimpleNamespace(**{**given, **parallel}),
    )


def identity(
    config: IntegrationConfig = CONFIG, model: Any = None, ranks: Ranks = RANKS, **changes: Any
) -> ModelIdentity:
    how = {
        "stage": "loaded",
        "reshard": False,
        "draft": False,
        "build": {"vllm": "0.32.0"},
        **changes,
    }
    return identity_of(config, a_vllm(), model or a_model(), ranks, **how)


def test_ranks_count_as_vllm_counts_them() -> None:
    places = [
        Ranks(tp=(tp, 2), pp=(pp, 2), pcp=(pcp, 2)).rank
        for pp in range(2)
        for pcp in range(2)
        for tp in range(2)
    ]
    assert places == list(range(8))
    assert RANKS.rank == 3
    assert RANKS.world_size == 4
    assert RANKS.topology == {"tp": (1, 2), "pp": (1, 2)}


def test_all_ranks_of_a_launch_are_one_instance_and_no_other_launch_is() -> None:
    seat = seat_of(CONFIG, a_vllm(), RANKS, draft=False)
    assert (seat.instance, seat.generation, seat.place.rank) == ("vllm.abcd", "abcd", 3)


def test_replicas_of_data_parallelism_and_drafts_are_instances() -> None:
    vllm = a_vllm(data_parallel_size=2, data_parallel_index=1)
    config = IntegrationConfig(instance="blue")
    assert seat_of(config, vllm, RANKS, draft=True).instance == "blue.abcd.dp1.draft"


def test_a_model_is_a_draft_only_where_it_is_not_the_target() -> None:
    target, draft = a_model(), a_model()
    speculative = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    assert is_draft(a_vllm(target, speculative), draft)
    assert is_draft(a_vllm(draft, speculative), draft)  # as vLLM makes it for a draft model
    assert not is_draft(a_vllm(target, speculative), target)
    assert not is_draft(a_vllm(target), target)
    ngram = SimpleNamespace(draft_model_config=target, target_model_config=target)
    assert not is_draft(a_vllm(target, ngram), target)


def test_the_name_is_the_users_else_that_which_is_served() -> None:
    assert identity(IntegrationConfig(model="m")).name == "m"
    assert identity().name == "qwen"
    assert identity(model=a_model(served_model_name=["a", "b"])).name == "a"
    assert identity(model=a_model(served_model_name=None)).name == "/models/qwen"
    assert identity(draft=True).name == "qwen.draft"


def test_the_revision_is_the_users_else_vllms_else_the_commit_of_the_configuration() -> None:
    config = HfConfig()
    config._commit_hash = "c0ffee"
    assert identity(model=a_model(hf_config=config)).revision == "c0ffee"
    assert identity(model=a_model(hf_config=config, revision="main")).revision == "main"
    assert identity(IntegrationConfig(revision="r9"), a_model(revision="main")).revision == "r9"


@pytest.mark.parametrize(
    "other",
    [
        {"ranks": Ranks(tp=(0, 4), pp=(0, 2))},
        {"ranks": Ranks(tp=(1, 2), pp=(1, 2), ep=(1, 4))},
        {"ranks": Ranks(tp=(1, 2), pp=(1, 2), pcp=(0, 2))},
        {"stage": "processed"},
        {"model": a_model(quantization="fp8")},
        {"model": a_model(hf_config=HfConfig(hidden_size=128))},
        {"model": a_model(dtype="torch.float16")},
    ],
)
def test_another_layout_is_another_identity(other: dict[str, Any]) -> None:
    assert identity(**other) != identity()


def test_layouts_that_can_be_resharded_into_each_other_have_one_identity() -> None:
    one = identity(ranks=Ranks(tp=(0, 1)), reshard=True)
    assert one == identity(ranks=Ranks(tp=(1, 4), pp=(0, 2)), reshard=True)
    assert one != identity(ranks=Ranks(tp=(0, 1)), reshard=False)
    assert one != identity(model=a_model(quantization="fp8"), reshard=True)


def test_ranks_of_one_layout_have_one_identity() -> None:
    assert identity(ranks=Ranks(tp=(0, 2), pp=(0, 2), nonce="efgh")) == identity()


@pytest.mark.parametrize(
    ("path", "entry"),
    [
        ("3f2a/rank_0_0/backbone/x.py", "3f2a"),
        ("3f2a", "3f2a"),
        ("torch_aot_compile/c7/inductor_cache/a.so", "torch_aot_compile/c7"),
        ("torch_aot_compile/c7", "torch_aot_compile/c7"),
    ],
)
def test_the_parts_of_a_compile_cache_are_the_folders_of_hashes(path: str, entry: str) -> None:
    assert cache_entry_of(path) == entry
