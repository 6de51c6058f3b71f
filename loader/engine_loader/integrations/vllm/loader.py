"""`--load-format engine_registry`: vLLM's model loader that copies from peers.

vLLM makes one for each model, in each worker, and one more for each reload. The stage `loaded`
fills and serves the memory that vLLM's own loader fills. The stage `processed` fills and serves the
memory after vLLM's post-processing: a peer post-processes random weights first, so that its memory
has the same layout.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
import vllm
from torch import nn
from vllm.distributed import parallel_state
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.groups import agree, gathered
from engine_loader.integrations.kept import Kept
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors
from engine_loader.integrations.vllm import hooks
from engine_loader.integrations.vllm.describing import Ranks, identity_of, is_draft, seat_of
from engine_loader.integrations.vllm.processed import Unprocessed, served_tensors


class EngineRegistryLoader(BaseModelLoader):  # type: ignore[misc]
    """Weights from peers that run the same model, else from vLLM's own loader; then serves them."""

    def __init__(self, load_config: Any) -> None:
        """Raises InvalidField, which names the keys that are known."""
        super().__init__(load_config)
        join_log("vllm")
        self.config = IntegrationConfig.of(load_config.model_loader_extra_config)
        self._start: ModelStart | None = None  # while a model is loaded for the first time
        self._kept: Kept | None = None

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded before it is this process's turn to read."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterable[Any]:
        """What a reload in place reads."""
        found: Iterable[Any] = self._own_loader().get_all_weights(model_config, model)
        return found

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fills a model that has its memory already."""
        own, start = self._own_loader(), self._start
        if start is None:  # a reload in place: the user wants what is on the disk
            own.load_weights(model, model_config)
            return
        tensors = loaded_tensors(model)
        start.fill(tensors, lambda: own.load_weights(model, model_config))
        if start.seeded is not None:
            self._kept = Kept(tensors)

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """A new model with its weights, which peers can copy from now on."""
        stage = "loaded" if self.config.stage == "auto" else self.config.stage
        start = self._new_start(vllm_config, model_config, stage)
        try:
            if stage == "processed":
                model = self._load_processed(start, vllm_config, model_config, prefix)
            else:
                model = self._load_loaded(start, vllm_config, model_config, prefix)
            self._settle(start, model, model_config)
        except BaseException:
            start.close()
            raise
        return model

    def _load_loaded(
        self, start: ModelStart, vllm_config: Any, model_config: Any, prefix: str
    ) -> nn.Module:
        """As vLLM loads any model, with our `load_weights`."""
        self._start = start
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            self._publish_loaded(start, model)
        finally:
            self._start = self._kept = None
        return model

    def _settle(self, start: ModelStart, model: nn.Module, model_config: Any) -> None:
        """All ranks have weights of one version. They are asked after they have published: a rank
        that waited for the others before could keep their peers waiting for it.
        """
        versions = gathered(parallel_state.get_world_group(), start.copied_version)
        if len(set(versions)) == 1:
            return
        start.give_up(
            "the ranks of this engine have copied weights of different versions "
            f"({', '.join(map(str, sorted(set(versions))))}), so all of them come from its disk",
            "start it again when its peers have one version",
        )
        if start.copied_version:
            self._reload(model, model_config)

    def _reload(self, model: Any, model_config: Any) -> None:
        """From the disk into a model that is processed; no second one may be made."""
        initialize_layerwise_reload(model)
        model.load_weights(self.get_all_weights(model_config, model))
        finalize_layerwise_reload(model, model_config)

    def _publish_loaded(self, start: ModelStart, model: nn.Module) -> None:
        kept = self._kept
        if kept is None:
            start.publish(model, {})
            return
        if changed := kept.changed():
            start.give_up(
                f"vLLM's post-processing has overwritten {len(changed)} loaded tensors, such as "
                f"{changed[0]}",
                "set `stage` to `processed`",
            )
        start.publish(
            model,
            kept.tensors,
            lambda module: None if kept.extra_nbytes(module) else kept.tensors,
            extra_nbytes=kept.extra_nbytes(model),
        )

    def _load_processed(
        self, start: ModelStart, vllm_config: Any, model_config: Any, prefix: str
    ) -> nn.Module:
        target: Any = torch.device(self.load_config.device or vllm_config.device_config.device)
        own, dry = self._own_loader(), False
        before: list[Unprocessed] = []
        with ExitStack() as stack:
            stack.enter_context(set_default_torch_dtype(model_config.dtype))
            with target:
                model: Any = self.create_model(vllm_config, model_config, prefix)

            def process() -> None:
                before.append(Unprocessed(model))
                process_weights_after_loading(model, model_config, target)

            def for_peers() -> dict[str, torch.Tensor]:
                nonlocal dry
                dry = True
                with target:
                    DummyModelLoader(self._own_config("dummy")).load_weights(model, model_config)
                    process()
                return served_tensors(model)

            def read() -> None:
                if dry:
                    self._reload(model, model_config)
                    return
                with target:
                    own.load_weights(model, model_config)
                    process()

            start.fill(for_peers, read)
            if lost := before[0].lost(model):
                start.give_up(
                    f"vLLM's post-processing has put {len(lost)} weights where no tensor shows "
                    f"them, such as {lost[0]}",
                    "set `stage` to `loaded`",
                )
            start.publish(model, served_tensors(model), served_tensors)
        ready: nn.Module = model.eval()
        return ready

    def _new_start(self, vllm_config: Any, model_config: Any, stage: str) -> ModelStart:
        draft, ranks = is_draft(vllm_config, model_config), _ranks(vllm_config)
        start = ModelStart(
            self.config,
            identity_of(
                self.config,
                vllm_config,
                model_config,
                ranks,
                stage=stage,
                draft=draft,
                build=_build(),
            ),
            seat_of(self.config, vllm_config, ranks, draft),
        )
        if vllm_config.parallel_config.enable_eplb:
            start.give_up(
                "vLLM moves experts between ranks while it runs (enable_eplb)",
                "switch it off, so that peers can copy the weights",
            )
        elif not hooks.install():
            start.give_up(
                f"vLLM {vllm.__version__} has other workers than this library knows, so a change "
                "of the weights would go unnoticed",
                "use a version that the documentation names",
            )
        return start

    def _own_loader(self) -> Any:
        return DefaultModelLoader(self._own_config(self.config.fallback_format))

    def _own_config(self, load_format: str) -> Any:
        """Without our settings, which no other loader takes."""
        return dataclasses.replace(
            self.load_config, load_format=load_format, model_loader_extra_config={}
        )


def _ranks(vllm_config: Any) -> Ranks:
    """All ranks call it at the same time."""
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


def _build() -> dict[str, str]:
    """Kernels choose layouts by the version of vLLM and by the device."""
    device = current_platform.device_type
    if not current_platform.is_cpu():
        device = f"{current_platform.get_device_name()} {current_platform.get_device_capability()}"
    else:
        device = f"cpu {current_platform.get_cpu_architecture().name}"
    return {"vllm": vllm.__version__, "device": device}
