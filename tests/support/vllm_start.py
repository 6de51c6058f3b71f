"""The start of a rank of the small model with vLLM's parameters, as vLLM's loader starts one.

`python -m tests.support.vllm_start SETTINGS STAGE DEVICE` is such a rank in a process: it prints a
line when it serves its weights, and ends with its input.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import StartEngine, start_engine_of
from engine_loader.integrations.room import built_beside_held
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors, runtime_tensors
from engine_loader.integrations.vllm.layout import Layout
from engine_registry import ModelIdentity, Place
from tests.support.vllm_layers import Model, checkpoint


@dataclass
class StartedRank:
    """A rank with its weights. Of a rank that has read them itself, `source` is `disk`."""

    start: ModelStart
    model: nn.Module

    @property
    def source(self) -> str:
        return cast(str, self.start.outcome().facts()["source"])

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it computes with."""
        return runtime_tensors(self.model)


def process(model: Any) -> None:
    """As vLLM's post-processing of fp8 and fused weights: transposed views, views with gaps, and
    tensors that are no parameters.
    """
    weight = nn.Parameter(model.qkv.weight.t(), requires_grad=False)
    model.qkv.weight = weight
    model.qkv.input_scale = torch.full((1,), 0.5, device=weight.device)
    padded = torch.nn.functional.pad(model.gate_up.weight, (0, 16))
    model.gate_up.weight = nn.Parameter(padded[:, :16], requires_grad=False)


def identity(stage: str, size: int) -> ModelIdentity:
    extra = {"stage": stage} | ({} if stage == "loaded" else {"axes": f"tp{size}"})
    return ModelIdentity("vllm", extra=extra)


def start_rank(
    settings: Mapping[str, Any],
    instance: str,
    *,
    rank: int = 0,
    size: int = 1,
    stage: str = "loaded",
    device: str = "cpu",
    seed: int = 0,
    start_engine: StartEngine = start_engine_of,
) -> StartedRank:
    """From peers, or from the checkpoint of the seed."""
    place = Place(rank, size, {"tp": (rank, size)})
    start = ModelStart(
        IntegrationConfig.of(settings),
        identity(stage, size),
        Seat(instance, f"g-{instance}", place),
        start_engine=start_engine,
    )
    with built_beside_held(torch.device(device)) as deferred:
        model = Model(rank, size)
        if deferred is None:
            model.to(device)
    if stage == "loaded":
        tensors = loaded_tensors(model)
        layout = Layout(model, tensors)
        start.fill(
            tensors,
            lambda: model.load_weights(checkpoint(seed)),
            layout.shards,
            module=model,
            deferred=deferred,
        )
        start.publish(model, tensors, loaded_tensors)
        return StartedRank(start, model)

    def for_peers() -> dict[str, torch.Tensor]:
        process(model)
        return runtime_tensors(model)

    def read() -> None:
        model.load_weights(checkpoint(seed))
        process(model)

    start.fill(for_peers, read)
    start.publish(model, runtime_tensors(model), runtime_tensors)
    return StartedRank(start, model)


def main(settings: str, stage: str, device: str) -> None:
    started = start_rank(json.loads(settings), "source", stage=stage, device=device)
    print(started.source, flush=True)
    sys.stdin.read()
    started.start.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
