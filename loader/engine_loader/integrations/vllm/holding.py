"""vLLM and weights that outlive their engine: with which of its settings they cannot, and how much
memory a worker will adopt.

It takes vLLM's objects and imports nothing of vLLM. Starts no thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from engine_loader.adopting.finding import HeldRank, find_held
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import Connection
from engine_loader.integrations.room import held_on, numbered
from engine_loader.integrations.vllm.describing import Ranks, identity_of
from engine_registry import ModelIdentity
from engine_registry.errors import InvalidField
from engine_registry.registration.held import Kept
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


def moves_weights(vllm_config: Any) -> str:
    """The setting by which vLLM itself moves weights from memory to memory. Empty: none."""
    if vllm_config.model_config.enable_sleep_mode:
        return "enable_sleep_mode"
    offload = getattr(vllm_config, "offload_config", None)
    if offload is not None and offload.uva.cpu_offload_gb > 0:
        return "cpu_offload_gb"
    if offload is not None and offload.prefetch.offload_group_size > 0:
        return "offload_group_size"
    return ""


def refuse_with_hold(config: IntegrationConfig, vllm_config: Any) -> None:
    """InvalidField where the weights are to be held, and vLLM moves them itself."""
    setting = moves_weights(vllm_config)
    if config.hold_s and config.stage == "processed":
        raise InvalidField(
            "what vLLM has processed cannot be held after its death: its kernels may know the "
            "addresses, and would compute with other memory",
            "leave out `stage`, or say loaded",
            field="hold_s",
        )
    if config.hold_s and setting:
        raise InvalidField(
            f"with {setting} vLLM moves its weights itself, so they cannot be held after its death",
            f"leave out one of `hold_s` and {setting}",
            field="hold_s",
        )


def adoptable_nbytes(
    config: IntegrationConfig, vllm_config: Any, ranks: Ranks, build: Mapping[str, str]
) -> int:
    """Bytes that the worker will adopt. A warning names what is held there for others."""
    if moves_weights(vllm_config) or config.stage == "processed":
        return 0
    device = numbered(torch.device(vllm_config.device_config.device))
    ours = list(_held_for(config, vllm_config, ranks, build, device))
    names = {found.kept.name for found in ours}
    _say_others(device, [kept for kept in held_on(device) if kept.name not in names])
    return sum(found.kept.nbytes for found in ours)


def _held_for(
    config: IntegrationConfig,
    vllm_config: Any,
    ranks: Ranks,
    build: Mapping[str, str],
    device: torch.device,
) -> Iterator[HeldRank]:
    with Connection(config) as connection:
        for model in _models_of(config, vllm_config, ranks, build):
            found = find_held(
                connection.registry,
                model,
                rank=ranks.rank,
                world_size=ranks.world_size,
                topology=ranks.topology,
                device=device,
            )
            if found is not None:
                yield found


def _models_of(
    config: IntegrationConfig, vllm_config: Any, ranks: Ranks, build: Mapping[str, str]
) -> Iterator[ModelIdentity]:
    """Each model that the worker loads; twice where its layers only say later how it is cut."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None) if speculative is not None else None
    for model_config in filter(None, [vllm_config.model_config, draft]):
        for reshard in (True, False) if config.reshard else (False,):
            yield identity_of(
                config,
                vllm_config,
                model_config,
                ranks,
                stage="loaded",
                reshard=reshard,
                draft=model_config is draft,
                build=build,
            )


def _say_others(device: torch.device, others: list[Kept]) -> None:
    for kept in others if device.type == "cuda" else ():
        log.warning(
            "%.2f GB of this GPU are held for %s for %.0f s more, and another model starts",
            kept.nbytes / 1e9,
            kept.key,
            kept.left_s,
            extra=fields("held_for_others", key=kept.key, nbytes=kept.nbytes),
        )
