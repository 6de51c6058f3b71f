"""Weights of a running SGLang from whoever publishes them: the side of `pull` inside SGLang.

The ranks of a tensor-parallel group agree on one content before a tensor is given out, and on the
outcome at the end. Each puts the whole tensors together, one layer at a time, and SGLang's own
`load_weights` takes its part of them. With the setting `mirror` the tensors come from the host's
memory, where a thread has loaded them while SGLang served.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from sglang.srt.runtime_context import get_model, get_parallel
from torch import nn

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.integrations.agreement import together
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import connect_registry, start_engine_of
from engine_loader.integrations.groups import gathered, read_one_content
from engine_loader.integrations.logs import reason
from engine_loader.integrations.mirroring import Mirroring
from engine_loader.integrations.sglang.order import Order
from engine_loader.integrations.sglang.plugin import SETTINGS, decode_settings
from engine_loader.loading.catalogue import Catalogue, read_catalogue
from engine_loader.loading.mirror import Mirror
from engine_loader.options import RELEASED, LoadOptions
from engine_loader.tensors.cuda import wait_for
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class PullFailed(LoaderError):
    """A rank of the group could not pull its weights. SGLang answers with it, and goes on."""


@dataclass
class _Pull:
    """One rank's part of a pull, and what it is known to have done."""

    model: nn.Module
    group: Any
    touched: bool = False  # the model's weights may be a mix
    source: str = ""
    version: int | None = None
    nbytes: int = 0
    changed: int = 0  # tensors that were given to SGLang
    load_s: float | None = None  # into the mirror, most of which may have been before

    def facts(self) -> dict[str, Any]:
        return {"load_s": round(self.load_s, 3)} if self.load_s is not None else {}


def pull_into(model: nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """As `pull`. Raises PullFailed on all ranks of the group where one of them fails."""
    group, began, error = get_parallel().tp_group, time.monotonic(), ""
    pull = _Pull(model, group)
    try:
        _run(pull, Order.decode(named_tensors))
    except Exception as exc:  # noqa: BLE001  the ranks of the group all end in the same way
        error = reason(exc)
    outcomes = gathered(group, (error, pull.touched))
    failed = {rank: why for rank, (why, _) in enumerate(outcomes) if why}
    if failed:
        rank, why = next(iter(failed.items()))
        touched = any(touched for _, touched in outcomes)
        state = "which may be a mix of two versions now" if touched else "which are as they were"
        raise PullFailed(
            f"{len(failed)} of {len(outcomes)} ranks could not pull their weights, {state}; "
            f"rank {rank}: {why}",
            "pull again",
        )
    pause_s = time.monotonic() - began  # SGLang answers no request meanwhile
    log.info(
        "pulled version %d of %s: %d tensors, %.1f MB in %.1f s",
        pull.version,
        pull.source,
        pull.changed,
        pull.nbytes / 1e6,
        pause_s,
        extra=fields(
            "weights_pulled",
            source=pull.source,
            version=pull.version,
            nbytes=pull.nbytes,
            pause_s=round(pause_s, 3),
            changed=pull.changed,
            **pull.facts(),
        ),
    )


def settings_of(order: Order) -> IntegrationConfig:
    """The settings that SGLang was started with, and in place of them those of the order."""
    started: Any = {}
    if get_model().load_format == "private":
        started = get_model().model_loader_extra_config or {}
        started = json.loads(started) if isinstance(started, str) else started
    elif text := os.environ.get(SETTINGS, "").strip():
        started = decode_settings(text)
    IntegrationConfig.of(started)
    return IntegrationConfig.of({**started, **order.settings})


def _run(pull: _Pull, order: Order) -> None:
    if get_parallel().pp_size > 1 and order.version in (None, RELEASED):
        raise InvalidField(
            "the pipeline stages of SGLang pull one after another, so the newest weights, or the "
            "released ones, may be others for each",
            "give the number of a `version` to `request`",
            field="version",
        )
    # A connection does not depend on labels, and a mapping could not be the key of one.
    config = replace(settings_of(order), labels=None)
    if not (config.mirror and _run_from_mirror(pull, order, config)):
        _run_from_source(pull, order, config)


def _run_from_mirror(pull: _Pull, order: Order, config: IntegrationConfig) -> bool:
    """False where there is no mirror, for all ranks. SGLang gets the tensors when all ranks have
    them.
    """
    mirroring = _mirroring_of(config, order.source, _device_of(pull.model))
    found: list[Mirror | None] = []

    def load() -> Exception | None:
        try:
            taken = mirroring.take(pull.group, order.version, order.timeout_s, wait=order.wait)
            found[:] = [taken]
        except Exception as exc:  # noqa: BLE001  all ranks of the group end in the same way
            return exc
        return None

    try:
        together(load, lambda: None, pull.group)
        (mirror,) = found
        if mirror is None:
            return False
        pull.touched = True
        load_weights: Any = pull.model.load_weights
        for names in mirror.groups:
            load_weights([(name, mirror.tensors[name]) for name in names])
        wait_for([_device_of(pull.model)])  # the mirror may change then
        pull.source, pull.version, pull.load_s = order.source, mirror.version, mirror.load_s
        pull.nbytes = sum(tensor.nbytes for tensor in mirror.tensors.values())
        pull.changed = len(mirror.tensors)
        return True
    finally:
        mirroring.release()


def _run_from_source(pull: _Pull, order: Order, config: IntegrationConfig) -> None:
    def read(contents: Sequence[str] | None) -> Catalogue:
        registry, engine = _connected(config)
        return read_catalogue(
            registry,
            engine,
            order.source,
            device=str(_device_of(pull.model)),
            timeout_s=order.timeout_s,
            options=LoadOptions(version=order.version, contents=contents, verify=config.verify),
        )

    catalogue = read_one_content(pull.group, read)
    pull.touched = True
    load_weights: Any = pull.model.load_weights
    for tensors in catalogue.by_group():
        load_weights(list(tensors.items()))
    pull.source, pull.version = catalogue.instance, catalogue.version
    pull.nbytes, pull.changed = catalogue.nbytes, len(catalogue.tensors)


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


_MIRRORINGS: dict[tuple[IntegrationConfig, str], Mirroring] = {}  # one at most


def _mirroring_of(config: IntegrationConfig, source: str, device: torch.device) -> Mirroring:
    """For all pulls from the source; another one takes its place."""
    key = config, source
    if key not in _MIRRORINGS:
        _close_mirrors()
        _MIRRORINGS[key] = Mirroring(
            lambda: _connected(config),
            source,
            LoadOptions(verify=config.verify),
            pinned=device.type == "cuda",
        )
    return _MIRRORINGS[key]


def _close_mirrors() -> None:
    for mirroring in _MIRRORINGS.values():
        mirroring.close()
    _MIRRORINGS.clear()


@lru_cache(maxsize=1)
def _connected(config: IntegrationConfig) -> tuple[Registry, Engine]:
    """For all pulls: an engine over RDMA takes long to start."""
    registry = connect_registry(config)
    engine = start_engine_of(config, registry)
    atexit.register(registry.close)
    atexit.register(engine.close)
    atexit.register(_close_mirrors)  # which comes first
    return registry, engine
