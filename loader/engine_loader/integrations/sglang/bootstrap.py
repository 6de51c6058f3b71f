"""SGLang's own transfer between instances, with etcd in the place of its node 0.

Seeds of all nodes register in etcd, by their world ranks, and starting instances find them there.
No gateway is needed. Where etcd does not help, SGLang does as it does without this library.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_model
from torch import nn

from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import connect_registry
from engine_loader.integrations.logs import join_log
from engine_loader.integrations.sglang.clients import Reading, Weights
from engine_loader.integrations.sglang.identity import (
    group_of,
    identity_of,
    place_here,
    seat_of_launch,
)
from engine_loader.integrations.sglang.seeds import publish_seed
from engine_loader.integrations.sglang.updates import Changes, follow_updates, updates_are_hooked
from engine_loader.starting.peers import find_peers
from engine_registry import ModelIdentity, RankRecord, Registry
from engine_registry.errors import EngineRegistryError
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_LOADERS = "sglang.srt.model_loader"
_TRANSPORTER = (
    "sglang.srt.model_executor.model_runner_components.remote_instance_weight_transporter"
    ".RemoteInstanceWeightTransporter"
)
_REGISTER = f"{_TRANSPORTER}._register_to_engine_info_bootstrap"
_LOADED = f"{_TRANSPORTER}.maybe_register_and_publish_weight_info"
_LOAD = (
    f"{_LOADERS}.loader.RemoteInstanceModelLoader"
    ".load_model_from_remote_instance_by_transfer_engine"
)
_FIND = (
    f"{_LOADERS}.remote_instance_weight_loader_utils"
    ".get_remote_instance_transfer_engine_info_per_rank"
)
_LOOKS = 16  # seeds whose readers are counted, to choose one
_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


class Bootstrap:
    """What takes the place of node 0 in one process."""

    def __init__(self, config: IntegrationConfig) -> None:
        self._config = config
        self._registry: Registry | None = None
        self._seeds: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def loaded(self, original: Callable[[Any], None], transporter: Any) -> None:
        """SGLang registers a seed that has read its disk. One that has read from another seed is
        as good.
        """
        original(transporter)
        if (
            get_model().remote_instance_weight_loader_start_seed_via_transfer_engine
            and transporter.weight_info is not None
            and transporter.model not in self._seeds
        ):
            self.register(lambda _: None, transporter)

    def register(self, original: Callable[[Any], None], transporter: Any) -> None:
        """In place of SGLang's registration at its node 0."""
        join_log("sglang")
        seat = seat_of_launch(self._config.instance or "sglang", group_of(is_draft=False))
        model = transporter.model
        self._seeds.add(model)
        try:
            if not updates_are_hooked():
                raise EngineRegistryError(
                    "this release of SGLang changes its weights in ways that are not known here",
                    "use a release of SGLang that this library was tested with",
                )
            seed = publish_seed(
                self._connected(),
                transporter,
                dict(model.named_parameters()),
                self._identity(model),
                seat,
                envs.MOONCAKE_PROTOCOL.get(),
                self._config.labels,
                self._config.location,
            )
        except Exception as exc:
            if self._config.required:
                raise
            _warn(f"{seat} is no seed in etcd", exc)
            original(transporter)
            return
        follow_updates(model, Changes(seed, lambda: dict(transporter.model.named_parameters())))
        log.info("%s is a seed", seat, extra=fields("seed_registered", rank=str(seat)))

    def load(
        self,
        original: Callable[..., bool],
        loader: Any,
        model: nn.Module,
        library: Any,
        seed_url: str,
        tp_rank: int,
    ) -> bool:
        """SGLang's transfer from a seed that etcd has, or as SGLang itself would do it."""
        join_log("sglang")
        try:
            identity = self._identity(model)
            tried: set[str] = set()
            while (record := self._next(identity, tried)) is not None:
                tried.add(record.incarnation)
                if self._from(record, library, original, loader, model, seed_url, tp_rank):
                    return True
            log.warning(
                "etcd has no seed of %s that can be read: SGLang asks %s",
                identity,
                seed_url,
                extra=fields("seed_missing", tried=len(tried)),
            )
        except Exception as exc:
            if self._config.required:
                raise
            _warn(f"SGLang asks {seed_url} for a seed", exc)
        return original(loader, model, library, seed_url, tp_rank)

    def find(
        self, original: Callable[..., tuple[Any, Any]], seed_url: str, rank: int
    ) -> tuple[str, Weights] | tuple[Any, Any]:
        """Where the parameters of the seed lie that is being read."""
        reading = _reading.get()
        return reading.answer if reading is not None else original(seed_url, rank)

    def _from(
        self,
        record: RankRecord,
        library: Any,
        original: Callable[..., bool],
        *arguments: Any,
    ) -> bool:
        loader, model, seed_url, tp_rank = arguments
        try:
            with Reading(self._connected(), record, library) as reading:
                token = _reading.set(reading)
                try:
                    if not original(loader, model, library, seed_url, tp_rank):
                        return False  # SGLang has logged why
                finally:
                    _reading.reset(token)
                reading.check()
        except EngineRegistryError as exc:
            _warn(f"the next seed is tried after {record.key}", exc)
            return False
        log.info(
            "SGLang has copied its weights from %s",
            record.key,
            extra=fields("seed_read", key=record.key, nbytes=record.manifest.nbytes),
        )
        return True

    def _next(self, identity: ModelIdentity, tried: set[str]) -> RankRecord | None:
        """The seed with the fewest readers."""
        place, registry = place_here(), self._connected()
        seeds = [
            record
            for record in find_peers(
                registry,
                identity,
                rank=place.rank,
                world_size=place.world_size or 1,
                topology=place.topology,
            )
            if record.incarnation not in tried
        ]
        return min(seeds[:_LOOKS], key=registry.pulls, default=None)

    def _identity(self, model: nn.Module) -> ModelIdentity:
        started = get_model()
        return identity_of(
            self._config,
            model,
            "transfer",
            name=started.model_path,
            revision=started.revision,
            dtype=str(next(model.parameters()).dtype),
            quantization=started.quantization,
        )

    def _connected(self) -> Registry:
        if self._registry is None:
            self._registry = connect_registry(self._config)
        return self._registry


def hook_transfer(settings: object) -> None:
    """Once a process; SGLang applies the hooks next. Raises InvalidField."""
    bootstrap = Bootstrap(IntegrationConfig.of(settings))
    hooks: dict[str, Callable[..., Any]] = {
        _REGISTER: bootstrap.register,
        _LOADED: bootstrap.loaded,
        _LOAD: bootstrap.load,
        _FIND: bootstrap.find,
    }
    for target, hook in hooks.items():
        if not HookRegistry._hooks.get(target):
            HookRegistry.register(target, hook, HookType.AROUND)


def _warn(what: str, error: Exception) -> None:
    why = error if isinstance(error, EngineRegistryError) else f"{type(error).__name__}: {error}"
    log.warning("%s: %s", what, why, extra=fields("bootstrap_failed", error=error))
