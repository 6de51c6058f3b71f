"""What vLLM's configuration says of a model and of this process, in our terms.

It takes vLLM's objects and imports nothing of vLLM. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.identity import EngineModel
from engine_loader.integrations.seat import Seat
from engine_registry import ModelIdentity, Place

ENGINE = "vllm"
_AHEAD = "torch_aot_compile"  # has a folder for each hash, as what is above it has


@dataclass(frozen=True)
class Ranks:
    """Where the process is, along each parallel axis of vLLM: its index, and the size of the axis.

    Attributes:
        tp: Tensor parallelism.
        pp: Pipeline parallelism.
        pcp: Context parallelism of the prefill.
        ep: Expert parallelism, over all replicas. Of size 1 where it is off.
        nonce: A text that all ranks of a launch share, and no other launch.
    """

    tp: tuple[int, int]
    pp: tuple[int, int] = (0, 1)
    pcp: tuple[int, int] = (0, 1)
    ep: tuple[int, int] = (0, 1)
    nonce: str = ""

    @property
    def rank(self) -> int:
        """In the replica, as vLLM counts: a pipeline stage has all its ranks in a row."""
        return (self.pp[0] * self.pcp[1] + self.pcp[0]) * self.tp[1] + self.tp[0]

    @property
    def world_size(self) -> int:
        return self.pp[1] * self.pcp[1] * self.tp[1]

    @property
    def topology(self) -> dict[str, tuple[int, int]]:
        """The axes by name; those that are always there, and others where they are used."""
        axes = {"tp": self.tp, "pp": self.pp}
        return axes | ({"pcp": self.pcp} if self.pcp[1] > 1 else {})


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    """Whether the model only proposes tokens. Methods without a model give the target's config."""
    speculative = vllm_config.speculative_config
    return (
        speculative is not None
        and model_config is getattr(speculative, "draft_model_config", None)
        and model_config is not getattr(speculative, "target_model_config", None)
    )


def seat_of(config: IntegrationConfig, vllm_config: Any, ranks: Ranks, draft: bool) -> Seat:
    """Which rank of which instance this process is. Replicas of data parallelism are instances."""
    parallel = vllm_config.parallel_config
    parts = [config.instance or ENGINE, ranks.nonce]
    if parallel.data_parallel_size > 1:
        parts.append(f"dp{parallel.data_parallel_index}")
    if draft:
        parts.append("draft")
    place = Place(ranks.rank, ranks.world_size, ranks.topology)
    return Seat(".".join(filter(None, parts)), ranks.nonce, place)


def identity_of(
    config: IntegrationConfig,
    vllm_config: Any,
    model_config: Any,
    ranks: Ranks,
    *,
    stage: str,
    reshard: bool,
    draft: bool,
    build: Mapping[str, str],
) -> ModelIdentity:
    """By which peers find the model; those of other layouts too with `reshard`. Raises
    InvalidField.
    """
    hf_config = model_config.hf_config
    name = config.model or _first(model_config.served_model_name) or model_config.model
    axes = {} if reshard else {axis: size for axis, (_, size) in ranks.topology.items()}
    return EngineModel(
        name=f"{name}.draft" if draft else name,
        revision=config.revision or model_config.revision or _commit(hf_config),
        dtype=str(model_config.dtype).removeprefix("torch."),
        quantization=model_config.quantization or "",
        engine=ENGINE,
        stage=stage,
        config=_as_mapping(hf_config),
        quantization_config=_as_mapping(getattr(hf_config, "quantization_config", None)),
        axes=axes | {"dp": vllm_config.parallel_config.data_parallel_size}
        if ranks.ep[1] > 1
        else axes,
        expert=ranks.ep,
        build=build,
    ).identity()


def cache_entry_of(path: str) -> str:
    """The folder of one hash that a path in vLLM's compile cache belongs to."""
    parts = path.split("/")
    return "/".join(parts[:2] if parts[0] == _AHEAD else parts[:1])


def _commit(hf_config: Any) -> str:
    """Of the repository that the configuration came from."""
    return str(getattr(hf_config, "_commit_hash", None) or "")


def _first(name: Any) -> str:
    return str(name[0] if name else "") if isinstance(name, list | tuple) else str(name or "")


def _as_mapping(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    return dict(config.to_dict() if hasattr(config, "to_dict") else vars(config))
