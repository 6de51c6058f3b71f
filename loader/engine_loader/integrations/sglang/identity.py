"""What a process of SGLang holds and which rank it is, from SGLang's own context.

Used in SGLang's processes, where SGLang has set up its parallel groups.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from sglang.srt.runtime_context import get_exec, get_parallel
from torch import nn

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.identity import EngineModel
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.sglang.place import expert_of, place_of
from engine_registry import ModelIdentity, Place


def seat_of_launch(base: str, group: Any) -> Seat:
    """The seat of this process. All ranks of the group call it together: the first one chooses the
    name.

    Args:
        base: What the name of the instance begins with.
        group: The ranks that hold the model.
    """
    launch: str = group.broadcast_object(uuid.uuid4().hex, src=0)
    return Seat(f"{base}-{launch[:8]}", launch, place_of(get_parallel()))


def group_of(is_draft: bool) -> Any:
    """The ranks that hold a model: all, but for a draft, which the last pipeline stage may hold."""
    return get_parallel().tp_group if is_draft else get_parallel().world_group


def place_here() -> Place:
    """The place of this process."""
    return place_of(get_parallel())


def identity_of(
    config: IntegrationConfig,
    module: nn.Module,
    stage: str,
    *,
    name: str,
    revision: str | None,
    dtype: str,
    quantization: str | None,
) -> ModelIdentity:
    """The identity of the weights by which peers find each other.

    Args:
        config: The user's settings, which come first.
        module: The model of SGLang.
        stage: Which memory of it is served.
        name: SGLang's name of the model.
        revision: SGLang's revision of it.
        dtype: The dtype that SGLang computes with.
        quantization: SGLang's name of the quantisation.
    """
    parallel = get_parallel()
    place = place_of(parallel)
    return EngineModel(
        name=config.model or name,
        revision=config.revision or revision or "",
        dtype=dtype.removeprefix("torch."),
        quantization=quantization or "",
        engine="sglang",
        stage=stage,
        config={"model": _as_mapping(getattr(module, "config", None)), "layout": _layout(parallel)},
        axes={axis: size for axis, (_, size) in place.topology.items()},
        expert=expert_of(parallel),
    ).identity()


def _layout(parallel: Any) -> dict[str, Any]:
    """Settings of SGLang that change which part of a weight a rank holds, beside the axes."""
    execution = get_exec()
    return {
        "moe_dense_tp_size": parallel.moe_dense_tp_size,
        "enable_dp_lm_head": parallel.enable_dp_lm_head,
        "enable_fp32_lm_head": execution.features.enable_fp32_lm_head,
        "ep_num_redundant_experts": execution.moe.ep_num_redundant_experts,
        "init_expert_location": execution.moe.init_expert_location,
    }


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    return config.to_dict() if hasattr(config, "to_dict") else {}
