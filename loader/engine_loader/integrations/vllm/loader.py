"""`--load-format engine_registry`: vLLM's model loader that copies from peers.

vLLM makes one for each model, in each worker, and one more for each reload. The stage `loaded`
fills and serves the memory that vLLM's own loader fills. The stage `processed` fills and serves the
memory after vLLM's post-processing: a peer post-processes random weights first, so that its memory
has the same layout.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
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
from vllm.utils.torch_utils import set_default_torch_dtype

from engine_loader.integrations.agreement import all_agree
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.groups import gathered
from engine_loader.integrations.kept import Kept
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.room import built_beside_held
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors
from engine_loader.integrations.vllm import compiling, hooks
from engine_loader.integrations.vllm.describing import identity_of, is_draft, seat_of
from engine_loader.integrations.vllm.holding import (
    adoptable_nbytes,
    moves_weights,
    refuse_with_hold,
)
from engine_loader.integrations.vllm.layout import Layout
from engine_loader.integrations.vllm.processed import Unprocessed, served_tensors
from engine_loader.integrations.vllm.worker import build_here, ranks_here
from engine_loader.tensors.deferred import Deferred
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


@dataclass
class _Loading:
    """A model that is loaded for the first time. `missed` are tensors that were not cut as their
    layers say; `kept` is for peers.
    """

    start: ModelStart
    missed: Sequence[str] = ()
    kept: Kept | None = None


class EngineRegistryLoader(BaseModelLoader):  # type: ignore[misc]
    """Weights from peers that run the same model, else from vLLM's own loader; then serves them."""

    def __init__(self, load_config: Any) -> None:
        """Raises InvalidField, which names the keys that are known."""
        super().__init__(load_config)
        join_log("vllm")
        self.config = IntegrationConfig.of(load_config.model_loader_extra_config)
        self._vllm_config: Any = None  # while a model is loaded for the first time
        self._loading: _Loading | None = None
        self._deferred: Deferred | None = None

    def download_model(self, model_config: Any) -> None:
        """Nothing is downloaded before it is this process's turn to read."""

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterable[Any]:
        """What a reload in place reads."""
        found: Iterable[Any] = self._own_loader().get_all_weights(model_config, model)
        return found

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """A model without weights, and without memory for them where what may be adopted leaves no
        room for both.
        """
        fills = self._vllm_config is not None and not moves_weights(vllm_config)
        with built_beside_held(self._device(vllm_config)) if fills else nullcontext() as deferred:
            model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        self._deferred = deferred
        return model

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fills a model that `create_model` has made, or that runs."""
        own, vllm_config = self._own_loader(), self._vllm_config
        if vllm_config is None:  # a reload in place: the user wants what is on the disk
            own.load_weights(model, model_config)
            return
        tensors = loaded_tensors(model)
        layout = self._layout_for_others(vllm_config, model, tensors)
        start = self._new_start(vllm_config, model_config, "loaded", reshard=layout is not None)
        loading = self._loading = _Loading(start)

        def read() -> None:
            with layout.checked() if layout is not None else nullcontext(()) as missed:
                own.load_weights(model, model_config)
            loading.missed = missed

        still = None if moves_weights(vllm_config) else model
        shards = layout.shards if layout is not None else None
        start.fill(tensors, read, shards, module=still, deferred=self._deferred)
        if start.seeded is not None:
            loading.kept = Kept(tensors)

    def get_external_weight_memory(self, vllm_config: Any) -> int:
        """Bytes on this worker's GPU that `load_model` will adopt, as its process had left them.

        vLLM takes them off the memory that it asks for. It calls this once, before it looks at how
        much memory is free.
        """
        refuse_with_hold(self.config, vllm_config)
        try:
            return adoptable_nbytes(self.config, vllm_config, ranks_here(vllm_config), build_here())
        except Exception as exc:  # noqa: BLE001  vLLM must not fail to start because of us
            log.info("it is not known what is held here: %s", exc, extra=fields("held_unknown"))
            return 0

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """A new model with its weights, which peers can copy from now on.

        Raises InvalidField where `hold_s` is set with what moves weights itself.
        """
        refuse_with_hold(self.config, vllm_config)
        load = self._load_processed if self.config.stage == "processed" else self._load_loaded
        try:
            model = load(vllm_config, model_config, prefix)
            if self._loading is not None:
                self._settle(self._loading.start, model, model_config)
        except BaseException:
            if self._loading is not None:
                self._loading.start.close()
            raise
        finally:
            self._loading = None
        return model

    def _load_loaded(self, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        """As vLLM loads any model, with our `load_weights`."""
        self._vllm_config = vllm_config
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
        finally:
            self._vllm_config = self._deferred = None
        if self._loading is not None:
            self._publish_loaded(self._loading, model)
        return model

    def _layout_for_others(
        self, vllm_config: Any, model: nn.Module, tensors: Mapping[str, torch.Tensor]
    ) -> Layout | None:
        """How the model is cut, where peers of other layouts can be filled from it, and it from
        them. All ranks call it, and answer alike.
        """
        if not self.config.reshard or vllm_config.parallel_config.enable_expert_parallel:
            return None
        layout = Layout(model, tensors)
        if layout.unknown:
            log.info(
                "only peers of the same layout count: vLLM's layers do not say which part of the "
                "model %d tensors are, such as %s",
                len(layout.unknown),
                layout.unknown[0],
                extra=fields("layout_unknown", tensors=len(layout.unknown)),
            )
        agreed = all_agree(not layout.unknown, parallel_state.get_world_group())
        return layout if agreed else None

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

    def _publish_loaded(self, loading: _Loading, model: nn.Module) -> None:
        start, kept, missed = loading.start, loading.kept, loading.missed
        if kept is None:
            start.publish(model, {})
            return
        if missed:
            start.give_up(
                f"the model fills {len(missed)} tensors without the loaders of vLLM's layers, such "
                f"as {missed[0]}, so it is not known which part of the model they are",
                "set `reshard` to false, so that only peers of the same layout count",
            )
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

    def _load_processed(self, vllm_config: Any, model_config: Any, prefix: str) -> nn.Module:
        start = self._new_start(vllm_config, model_config, "processed", reshard=False)
        self._loading = _Loading(start)
        target: Any = self._device(vllm_config)
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

    def _new_start(
        self, vllm_config: Any, model_config: Any, stage: str, *, reshard: bool
    ) -> ModelStart:
        draft, ranks = is_draft(vllm_config, model_config), ranks_here(vllm_config)
        seat = seat_of(self.config, vllm_config, ranks, draft)
        start = ModelStart(
            self.config,
            identity_of(
                self.config,
                vllm_config,
                model_config,
                ranks,
                stage=stage,
                reshard=reshard,
                draft=draft,
                build=build_here(),
            ),
            seat,
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
        else:
            compiling.pull_compile_cache(self.config, vllm_config, ranks, seat)
        return start

    def _device(self, vllm_config: Any) -> torch.device:
        return torch.device(self.load_config.device or vllm_config.device_config.device)

    def _own_loader(self) -> Any:
        return DefaultModelLoader(self._own_config(self.config.fallback_format))

    def _own_config(self, load_format: str) -> Any:
        """Without our settings, which no other loader takes."""
        return dataclasses.replace(
            self.load_config, load_format=load_format, model_loader_extra_config={}
        )
