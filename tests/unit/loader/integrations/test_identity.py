"""Which engines are the same to each other, and so may exchange their memory."""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import Any

import pytest

from engine_loader.integrations.identity import EngineModel, fingerprint

MODEL = EngineModel(
    name="qwen",
    revision="r1",
    dtype="bfloat16",
    engine="vllm",
    config={"hidden_size": 64, "_name_or_path": "/models/qwen"},
    axes={"tp": 2, "pp": 1},
    build={"vllm": "0.32.0", "device": "cpu"},
)


class Kind(enum.Enum):
    CHANNEL = "channel"


def test_the_identity_says_what_the_engine_knows() -> None:
    identity = MODEL.identity()
    assert (identity.name, identity.revision, identity.dtype) == ("qwen", "r1", "bfloat16")
    assert identity.extra["engine"] == "vllm"
    assert identity.extra["stage"] == "loaded"
    assert identity.extra["axes"] == "pp1.tp2"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "llama"},
        {"revision": "r2"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"engine": "sglang"},
        {"stage": "processed"},
        {"config": {"hidden_size": 128}},
        {"quantization_config": {"bits": 8}},
        {"axes": {"tp": 4, "pp": 1}},
        {"expert": (1, 2)},
    ],
)
def test_an_engine_that_differs_in_memory_is_another(change: dict[str, Any]) -> None:
    assert replace(MODEL, **change).identity() != MODEL.identity()


def test_where_the_model_was_read_from_makes_no_difference() -> None:
    elsewhere = {"hidden_size": 64, "_name_or_path": "/mnt/qwen", "transformers_version": "5"}
    assert replace(MODEL, config=elsewhere).identity() == MODEL.identity()


def test_the_build_counts_only_for_processed_weights() -> None:
    newer = {"vllm": "0.33.0", "device": "cpu"}
    assert replace(MODEL, build=newer).identity() == MODEL.identity()
    processed = replace(MODEL, stage="processed")
    assert replace(processed, build=newer).identity() != processed.identity()


def test_a_fingerprint_does_not_depend_on_order_or_on_addresses() -> None:
    class Scheme:
        pass

    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert fingerprint({"a": Scheme()}) == fingerprint({"a": Scheme()})
    assert fingerprint({"a": {"x", "y"}}) == fingerprint({"a": {"y", "x"}})
    assert fingerprint({"a": Kind.CHANNEL}) == fingerprint({"a": "channel"})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
