"""`--weight-transfer-config '{"backend": "engine_registry"}'`: vLLM takes the weights of a trainer.

The trainer calls `publish_state_dict`, in any layout, and `update` for each step. Each worker of
vLLM pulls whole tensors, a layer at a time, into vLLM's own loaders. All workers take the same
content. vLLM's routes and calls drive it: they name the trainer once, and start each update.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed import parallel_state
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from engine_loader.integrations.agreement import together
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import Connection
from engine_loader.integrations.groups import read_one_content
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.vllm import NAME
from engine_loader.loading.catalogue import Catalogue, read_catalogue
from engine_loader.options import LoadOptions, Version, checked_version
from engine_registry.errors import InvalidField
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


@dataclass
class TrainerInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Whom to take weights from.

    Attributes:
        source: The instance that the trainer publishes.
        config: How to reach it.
    """

    source: str
    config: IntegrationConfig = field(default_factory=IntegrationConfig)


@dataclass
class Step(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Which weights to take.

    Attributes:
        version: The version of the trainer's publication. None takes the newest, `"released"` the
            one that the trainer has released.
    """

    version: Version | None = None


class RegistryTransfer(WeightTransferEngine[TrainerInfo, Step]):  # type: ignore[misc]
    """Pulls a trainer's weights into a worker.

    Attributes:
        version: The version that the worker has taken last. None before the first.
        contents: Its contents, by rank of the trainer.
        pause_s: For how many seconds the last update has left the model without whole weights,
            which no request can use meanwhile. None before the first.
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
        self._stopped_at = 0.0
        self._info: TrainerInfo | None = None
        self._connection: Connection | None = None
        self._begun = False  # layers have given up their memory for that of an update

    def parse_init_info(self, init_dict: dict[str, Any]) -> TrainerInfo:
        """`source`, and settings of `IntegrationConfig`; by default those of the load format.

        Raises InvalidField, which is a ValueError.
        """
        values = dict(init_dict)
        source = values.pop("source", None)
        if not isinstance(source, str) or not source:
            raise InvalidField(
                f"`source` {source!r} is not valid: it is the instance that the trainer publishes",
                "give the name that the trainer gave to `publish_state_dict`",
                field="source",
            )
        return TrainerInfo(source, IntegrationConfig.of({**self._defaults(), **values}))

    def parse_update_info(self, update_dict: dict[str, Any]) -> Step:
        """`version`, or nothing. Raises InvalidField, which is a ValueError."""
        if unknown := sorted(set(update_dict) - {"version"}):
            raise InvalidField(
                f"the update has unknown keys: {', '.join(unknown)}",
                "known is version",
                field=unknown[0],
            )
        return Step(checked_version(update_dict.get("version")))

    def init_transfer_engine(self, init_info: TrainerInfo) -> None:
        """Connects; the trainer may come later. Raises EngineUnavailable."""
        self.shutdown()
        self._info = init_info
        self._connection = Connection(init_info.config)
        self._connection.engine  # noqa: B018  so that an engine that cannot be started is seen now

    def start_weight_update(self) -> None:
        """Prepares the layers of the model."""
        if self._begun:  # an update has failed, and has left layers half done
            finalize_layerwise_reload(self.model, self.model_config)
        else:
            self._stopped_at = time.monotonic()
        initialize_layerwise_reload(self.model)
        self._begun = True

    def receive_weights(self, update_info: Step) -> None:
        """Takes all weights of one content, the same in all workers.

        Raises:
            TornRead: The trainer changed its weights in each of several attempts.
            LoaderError: What `read_catalogue` raises.
            RegistryError: What `read_catalogue` raises.
        """
        world, began = parallel_state.get_world_group(), time.monotonic()
        together(lambda: self._take(update_info, world), self.start_weight_update, world)
        log.info(
            "the worker has version %s of %s after %.2f s",
            self.version,
            self._source(),
            time.monotonic() - began,
            extra=fields("weights_taken", source=self._source(), version=self.version),
        )

    def finish_weight_update(self) -> None:
        """The model computes with the new weights."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._begun = False
        self.pause_s = time.monotonic() - self._stopped_at
        log.info(
            "the model of the worker was without whole weights for %.2f s",
            self.pause_s,
            extra=fields("weights_applied", source=self._source(), pause_s=round(self.pause_s, 3)),
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As vLLM calls it; a device for which torch has no accelerator needs no waiting."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def shutdown(self) -> None:
        """Closes what is connected, any number of times."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _take(self, step: Step, world: Any) -> Exception | None:
        """The error, where it does not work. All workers call it."""
        try:
            catalogue = read_one_content(world, lambda contents: self._read(step, contents))
            self.model.load_weights(_copies(catalogue))
        except Exception as exc:  # noqa: BLE001
            return exc
        self.version, self.contents = catalogue.version, catalogue.contents
        return None

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


def _copies(catalogue: Catalogue) -> Iterator[tuple[str, torch.Tensor]]:
    """vLLM holds on to tensors until their layer is complete, some until the end of the update, and
    the catalogue uses its memory again for the next group.
    """
    for name, tensor in catalogue:
        yield name, tensor.clone()
