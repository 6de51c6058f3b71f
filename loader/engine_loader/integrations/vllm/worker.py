"""What the worker of vLLM that runs this is: its ranks, and the build of vLLM."""

from __future__ import annotations

import uuid
from typing import Any

import vllm
from vllm.distributed import parallel_state
from vllm.platforms import current_platform

from engine_loader.integrations.groups import agree
from engine_loader.integrations.vllm.describing import Ranks


def ranks_here(vllm_config: Any) -> Ranks:
    """Where it is among the ranks of its engine. All of them call it at the same time."""
    parallel = vllm_config.parallel_config
    tp, pp = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    pcp = parallel_state.get_pcp_group()
    nonce = agree(parallel_state.get_world_group(), uuid.uuid4().hex[:8])
    expert = (0, 1)
    if parallel.enable_expert_parallel and parallel_state._EP is not None:
        group = parallel_state.get_ep_group()
        expert = (group.rank_in_group, group.world_size)
    return Ranks(
        tp=(tp.rank_in_group, tp.world_size),
        pp=(pp.rank_in_group, pp.world_size),
        pcp=(pcp.rank_in_group, pcp.world_size),
        ep=expert,
        nonce=nonce,
    )


def build_here() -> dict[str, str]:
    """Kernels choose layouts by the version of vLLM and by the device."""
    device = current_platform.device_type
    if not current_platform.is_cpu():
        device = f"{current_platform.get_device_name()} {current_platform.get_device_capability()}"
    else:
        device = f"cpu {current_platform.get_cpu_architecture().name}"
    return {"vllm": vllm.__version__, "device": device}
