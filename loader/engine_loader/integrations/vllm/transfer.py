"""`--weight-transfer-config '{"backend": "engine_registry"}'`: vLLM takes the weights of a trainer.

The trainer calls `publish_state_dict`, in any layout, and `update` or `snapshot` for each step.
Each worker of vLLM pulls whole tensors, a layer at a time, into vLLM's own loaders. With the
setting `mirror` it takes them from the host's memory, where a thread has loaded them while vLLM
served. All workers take the same content. vLLM's routes and calls drive it: they name the trainer
once, and start each update.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from vllm.distributed import parallel_state
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from engine_loader.integrations.agreement import together
from engine_loader.integrations.connecting import Connection
from engine_loader.integrations.groups import read_one_content
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.mirroring import Mirroring
from engine_loader.integrations.vllm import NAME, hooks
from engine_loader.integrations.vllm.calls import Step, TrainerInfo
from engine_loader.integrations.vllm.handing import Handing
from engine_loader.loading.catalogue import Catalogue, read_catalogue
from engine_loader.loading.mirror import Mirror
from engine_loader.options import LoadOptions
from engine_registry.errors import InvalidField
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class RegistryTransfer(WeightTransferEngine[TrainerInfo, Step]):  # type: ignore[misc]
    """Pulls a trainer's weights into a worker.

    Attributes:
        version: The version that the worker has taken last. None before the first.
        contents: Its contents, by rank of the trainer.
        pause_s: For how many seconds the last update has stopped vLLM, from its start to its end.
            None before the first.
        load_s: How many seconds it took to load its weights into the mirror, most of which may have
            been before the update. None without a mirror.
        changed: How many tensors the last update has handed to the model.
        all_failed: Whether the last call of `update_weights` has failed in all workers.
    """

    init_info_cls = TrainerInfo
    update_info_cls = Step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM makes it. Connects nothing."""
        super().__init__(*args, **kwargs)
        join_log("vllm")
        self.version: int | None = None
        self.contents: tuple[str, ...] = ()
        self.pause_s: float | None = None
        self.load_s: float | None = None
        self.changed = 0
        self.all_failed = False
        self._stopped_at = 0.0
        self._info: TrainerInfo | None = None
        self._connection: Connection | None = None
        self._begun = False  # layers have given up their memory for that of an update
        self._mirroring: Mirroring | None = None
        self._handings: weakref.WeakKeyDictionary[Any, Handing] = weakref.WeakKeyDictionary()
        self._partly = False  # a change of the weights by somebody else is noticed

    def parse_init_info(self, init_dict: dict[str, Any]) -> TrainerInfo:
        """`source`, and settings of `IntegrationConfig`; by default those of the load format.

        Raises InvalidField, which is a ValueError.
        """
        return TrainerInfo.of(init_dict, self._defaults())

    def parse_update_info(self, update_dict: dict[str, Any]) -> Step:
        """`version`, `wait`, or nothing. Raises InvalidField, which is a ValueError."""
        return Step.of(update_dict)

    def init_transfer_engine(self, init_info: TrainerInfo) -> None:
        """Connects; the trainer may come later. Raises EngineUnavailable."""
        self.shutdown()
        self._info = init_info
        self._connection = connection = Connection(init_info.config)
        connection.engine  # noqa: B018  so that an engine that cannot be started is seen now
        self._partly = hooks.install()
        hooks.tell(self)
        if init_info.config.mirror:
            self._mirroring = Mirroring(
                lambda: (connection.registry, connection.engine),
                init_info.source,
                LoadOptions(verify=init_info.config.verify),
                pinned=self.device.type == "cuda",
            )

    def start_weight_update(self) -> None:
        """From here on vLLM counts as stopped. The model stays as it is until there are weights."""
        if not self._begun:  # else an update has failed, and the model has waited since
            self._stopped_at = time.monotonic()
        self._end_reload()

    def receive_weights(self, update_info: Step) -> None:
        """Takes all weights of one content, the same in all workers.

        Raises:
            TornRead: The trainer changed its weights in each of several attempts.
            LoaderError: What `read_catalogue` raises.
            RegistryError: What `read_catalogue` raises.
        """
        world, began = parallel_state.get_world_group(), time.monotonic()
        try:
            if not self._take_from_mirror(update_info, world):
                take = partial(self._take, update_info, world)
                together(lambda: _failure_of(take), self._end_reload, world)
        except BaseException as exc:
            self.all_failed = isinstance(exc, Exception)  # as they do `together`
            if self._begun:
                self.forget()
            self._release()
            raise
        log.info(
            "the worker has version %s of %s after %.2f s",
            self.version,
            self._source(),
            time.monotonic() - began,
            extra=fields("weights_taken", source=self._source(), version=self.version),
        )

    def finish_weight_update(self) -> None:
        """The model computes with the new weights."""
        self._end_reload()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # nothing reads the mirror any more
        self._release()
        self.pause_s = time.monotonic() - self._stopped_at
        facts: dict[str, Any] = {"changed": self.changed}
        if self.load_s is not None:
            facts["load_s"] = round(self.load_s, 3)
        log.info(
            "the worker was stopped for %.2f s by an update of %d tensors",
            self.pause_s,
            self.changed,
            extra=fields(
                "weights_applied", source=self._source(), pause_s=round(self.pause_s, 3), **facts
            ),
        )

    def forget(self) -> None:
        """The weights of the models are others than those of the last update."""
        for handing in self._handings.values():
            handing.forget()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM calls it; a device for which torch has no accelerator needs no waiting."""
        self.all_failed = False
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Closes what is connected, any number of times."""
        if self._mirroring is not None:
            self._mirroring.close()
        if self._connection is not None:
            self._connection.close()
        self._connection = self._mirroring = None

    def _take_from_mirror(self, step: Step, world: Any) -> bool:
        """False where there is no mirror, for all workers. The model is as it was until the mirrors
        of all workers have the weights.
        """
        mirroring, info = self._mirroring, self._info
        if mirroring is None or info is None:
            return False
        found: list[Mirror | None] = []

        def load() -> None:
            taken = mirroring.take(world, step.version, info.config.timeout_s, wait=step.wait)
            found[:] = [taken]

        together(lambda: _failure_of(load), lambda: None, world)
        (mirror,) = found
        if mirror is None:
            return False
        hand = partial(self._hand, mirror)
        together(lambda: _failure_of(hand), self._end_reload, world)
        self.version, self.contents = mirror.version, mirror.contents
        self.load_s = mirror.load_s
        return True

    def _hand(self, mirror: Mirror) -> None:
        handing = self._handings.setdefault(self.model, Handing())
        quantised = self.vllm_config.quant_config or self.model_config.quantization
        self._end_reload()
        self._begun = True
        self._begun = handing.hand(self.model, mirror, self._partly and not quantised)
        self.changed = handing.changed
        for other in self._handings.values():
            if other is not handing:  # a draft may share modules with its target
                other.forget()

    def _take(self, step: Step, world: Any) -> None:
        """All workers call it."""
        catalogue = read_one_content(world, lambda contents: self._read(step, contents))
        self.forget()
        self._end_reload()
        self._begun = True
        initialize_layerwise_reload(self.model)
        self.model.load_weights(_copies(catalogue))
        self.version, self.contents = catalogue.version, catalogue.contents
        self.load_s, self.changed = None, len(catalogue.tensors)

    def _end_reload(self) -> None:
        if self._begun:
            finalize_layerwise_reload(self.model, self.model_config)
        self._begun = False

    def _release(self) -> None:
        if self._mirroring is not None:
            self._mirroring.release()

    def _read(self, step: Step, contents: Sequence[str] | None) -> Catalogue:
        if self._info is None or self._connection is None:
            raise InvalidField(
                "no trainer is known to take weights from",
                "call vLLM's `init_weight_transfer_engine` with its `source` first",
                field="source",
            )
        return read_catalogue(
            self._connection.registry,
            self._connection.engine,
            self._info.source,
            device=self.device,
            timeout_s=self._info.config.timeout_s,
            options=LoadOptions(version=step.version, contents=contents),
        )

    def _source(self) -> str:
        return self._info.source if self._info is not None else ""

    def _defaults(self) -> Mapping[str, Any]:
        load_config = self.vllm_config.load_config
        ours = load_config.load_format == NAME
        return dict(load_config.model_loader_extra_config) if ours else {}


def _failure_of(act: Callable[[], object]) -> Exception | None:
    try:
        act()
    except Exception as exc:  # noqa: BLE001  all workers end in the same way
        return exc
    return None


def _copies(catalogue: Catalogue) -> Iterator[tuple[str, torch.Tensor]]:
    """vLLM holds on to tensors until their layer is complete, some until the end of the update, and
    the catalogue uses its memory again for the next group.
    """
    for name, tensor in catalogue:
        yield name, tensor.clone()
