"""The loader behind `--load-format private`: weights from peers, else from SGLang's own loader of
checkpoints, and then for peers.

SGLang makes it in each of its schedulers. It starts the processes and threads of `ModelStart`.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig, LoadFormat
from sglang.srt.model_loader.loader import (
    DefaultModelLoader,
    _get_quantization_config,
    _initialize_model,
)
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_exec
from torch import nn

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.groups import gathered
from engine_loader.integrations.kept import Kept
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.room import built_beside_held, held_on
from engine_loader.integrations.sglang.identity import group_of, identity_of, seat_of_launch
from engine_loader.integrations.sglang.updates import (
    Changes,
    follow_updates,
    moves_experts,
    updates_are_hooked,
)
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors
from engine_registry.errors import InvalidField


class PeerModelLoader(DefaultModelLoader):  # type: ignore[misc]  # SGLang is not installed here
    """Loads as SGLang's default loader does, unless there are peers. SGLang also uses it to read
    another checkpoint into a model that runs.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        """Raises InvalidField where the extra configuration is not valid."""
        self.config = IntegrationConfig.of(load_config.model_loader_extra_config)
        if self.config.stage == "processed":
            raise InvalidField(
                "SGLang serves the memory that its loader fills, not the processed one",
                "leave out `stage`, or say loaded",
                field="stage",
            )
        if self.config.artifacts:
            raise InvalidField(
                "SGLang's compile caches are not copied by its loader",
                "leave out `artifacts`, and say `engines artifacts pull` before SGLang starts",
                field="artifacts",
            )
        super().__init__(
            replace(
                load_config,
                load_format=_own_format(self.config),
                model_loader_extra_config={},
            )
        )

    def load_model(self, *, model_config: Any, device_config: Any) -> nn.Module:
        """The model with its weights. They come from peers, or from the checkpoint."""
        join_log("sglang")
        saves_memory = get_exec().features.enable_memory_saver
        if self.config.hold_s and saves_memory:
            raise InvalidField(
                "with enable_memory_saver SGLang gives the memory of its weights back while it is "
                "released, so they cannot be held after its death",
                "leave out one of `hold_s` and enable_memory_saver",
                field="hold_s",
            )
        device = torch.device(device_config.device)
        base = self.config.instance or "sglang"
        is_draft = bool(model_config.is_draft_model)
        seat = seat_of_launch(f"{base}.draft" if is_draft else base, group_of(is_draft))
        with set_default_torch_dtype(model_config.dtype):
            quantization = _get_quantization_config(model_config, self.load_config)
            with device, nullcontext() if saves_memory else built_beside_held(device) as deferred:
                model: nn.Module = _initialize_model(model_config, self.load_config, quantization)
            held = {kept.name: kept.nbytes for kept in held_on(device)}
            start = ModelStart(
                self.config,
                identity_of(
                    self.config,
                    model,
                    "loaded",
                    name=model_config.model_path,
                    revision=model_config.revision,
                    dtype=str(model_config.dtype),
                    quantization=model_config.quantization,
                ),
                seat,
            )
            tensors = loaded_tensors(model)
            start.fill(
                tensors,
                lambda: self.load_weights_only(
                    model, self._get_all_weights(model_config, model), device
                ),
                module=None if saves_memory else model,
                deferred=deferred,
            )
            left = {kept.name for kept in held_on(device)}
            # SGLang has looked at the free memory before
            self.preloaded_weights_bytes = sum(held[name] for name in held.keys() - left)
            kept = Kept(tensors)
            self.postprocess_weights(model, device)
        self._serve(start, model, kept)
        if not _is_of_one_version(start, group_of(is_draft)) and start.copied_version:
            with set_default_torch_dtype(model_config.dtype):
                self.restore_weights_before_loading(model, device)
                self.load_weights_and_postprocess(
                    model, self._get_all_weights(model_config, model), device
                )
        return model.eval()

    def _serve(self, start: ModelStart, model: nn.Module, kept: Kept) -> None:
        if moves_experts():
            start.give_up(
                "SGLang moves experts between ranks while it runs (EPLB), so peers would read "
                "others than they ask for",
                "switch it off, so that peers can copy the weights",
            )
        elif changed := kept.changed():
            start.give_up(
                f"SGLang's post-processing has written to {len(changed)} loaded tensors, such as "
                f"{changed[0]}, so peers cannot load them",
                "use another load format for this quantisation",
            )
        elif not updates_are_hooked():
            start.give_up(
                "this release of SGLang changes its weights in ways that are not known here, so "
                "peers could read half of a change",
                "use a release of SGLang that this library was tested with",
            )
        extra_nbytes = kept.extra_nbytes(model)
        start.publish(model, kept.tensors, extra_nbytes=extra_nbytes)
        if start.serves:
            same_memory = extra_nbytes == 0
            model_of = weakref.ref(model)
            follow_updates(
                model, Changes(start, lambda: _tensors_of(model_of()) if same_memory else None)
            )


def _is_of_one_version(start: ModelStart, group: Any) -> bool:
    """Whether all ranks have weights of one version; they serve none otherwise. They are asked
    after they have published, as a rank may wait for what another one publishes.
    """
    versions = sorted(set(gathered(group, start.copied_version)))
    if len(versions) > 1:
        start.give_up(
            "the ranks of this engine have copied weights of different versions "
            f"({', '.join(map(str, versions))}), so all of them come from its disk",
            "start it again when its peers have one version",
        )
    return len(versions) == 1


def _tensors_of(model: nn.Module | None) -> dict[str, torch.Tensor] | None:
    return loaded_tensors(model) if model is not None else None


def _own_format(config: IntegrationConfig) -> LoadFormat:
    known = {
        one.value: one
        for one in (
            LoadFormat.AUTO,
            LoadFormat.SAFETENSORS,
            LoadFormat.PT,
            LoadFormat.NPCACHE,
            LoadFormat.MISTRAL,
        )
    }
    if config.fallback_format not in known:
        raise InvalidField(
            f"`fallback_format` {config.fallback_format!r} is not one that SGLang's default loader "
            "reads",
            f"use one of {', '.join(known)}",
            field="fallback_format",
        )
    return known[config.fallback_format]
