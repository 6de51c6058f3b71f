"""With which settings of vLLM its weights cannot be held after its death."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.vllm.holding import moves_weights, refuse_with_hold
from engine_registry.errors import InvalidField


def a_vllm(*, sleeps: bool = False, offload_gb: float = 0, group_size: int = 0) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(enable_sleep_mode=sleeps),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=offload_gb),
            prefetch=SimpleNamespace(offload_group_size=group_size),
        ),
    )


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"sleeps": True}, "enable_sleep_mode"),
        ({"offload_gb": 1.5}, "cpu_offload_gb"),
        ({"group_size": 8}, "offload_group_size"),
    ],
)
def test_weights_that_vllm_moves_itself_are_not_held(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidField) as caught:
        refuse_with_hold(IntegrationConfig(hold_s=300), a_vllm(**settings))
    assert caught.value.details["field"] == "hold_s"
    assert f"leave out one of `hold_s` and {name}" in str(caught.value)
    refuse_with_hold(IntegrationConfig(), a_vllm(**settings))
    assert moves_weights(a_vllm(**settings)) == name


def test_what_vllm_has_processed_is_not_held() -> None:
    with pytest.raises(InvalidField, match="its kernels may know the addresses"):
        refuse_with_hold(IntegrationConfig(hold_s=300, stage="processed"), a_vllm())


def test_weights_that_stay_where_they_are_can_be_held() -> None:
    refuse_with_hold(IntegrationConfig(hold_s=300), a_vllm())
    assert moves_weights(a_vllm()) == ""
