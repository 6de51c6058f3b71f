"""Weights of a running SGLang from whoever publishes them: the side of `pull` inside SGLang.

The ranks of a tensor-parallel group agree on one content before a tensor is given out, and on the
outcome at the end. Each puts the whole tensors together, one layer at a time, and SGLang's own
`load_weights` takes its part of them.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from sglang.srt.runtime_context import get_model, get_parallel
from torch import nn

from engine_loader.engines.base import Engine
from engine_loader.errors import LoaderError
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.connecting import connect_registry, start_engine_of
from engine_loader.integrations.groups import gathered, read_one_content
from engine_loader.integrations.logs import reason
from engine_loader.integrations.sglang.order import Order
from engine_loader.integrations.sglang.plugin import SETTINGS, decode_settings
from engine_loader.loading.catalogue import Catalogue, read_catalogue
from engine_loader.options import RELEASED, LoadOptions
from engine_registry import Registry
from engine_registry.errors import InvalidField
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)


class PullFailed(LoaderError):
    """A rank of the group could not pull its weights. SGLang answers with it, and goes on."""


def pull_into(model: nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """As `pull`. Raises PullFailed on all ranks of the group where one of them fails."""
    group, began, error = get_parallel().tp_group, time.monotonic(), ""
    try:
        catalogue = _pull(model, group, Order.decode(named_tensors))
    except Exception as exc:  # noqa: BLE001  the ranks of the group all end in the same way
        error = reason(exc)
    errors = gathered(group, error)
    failed = {rank: one for rank, one in enumerate(errors) if one}
    if failed:
        rank, why = next(iter(failed.items()))
        raise PullFailed(
            f"{len(failed)} of {len(errors)} ranks could not pull their weights, which may be a "
            f"mix of two versions now; rank {rank}: {why}",
            "pull again",
        )
    pause_s = time.monotonic() - began  # SGLang answers no request meanwhile
    log.info(
        "pulled version %d of %s: %d tensors, %.1f MB in %.1f s",
        catalogue.version,
        catalogue.instance,
        len(catalogue.tensors),
        catalogue.nbytes / 1e6,
        pause_s,
        extra=fields(
            "weights_pulled",
            source=catalogue.instance,
            version=catalogue.version,
            nbytes=catalogue.nbytes,
            pause_s=round(pause_s, 3),
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


def _pull(model: nn.Module, group: Any, order: Order) -> Catalogue:
    if get_parallel().pp_size > 1 and order.version in (None, RELEASED):
        raise InvalidField(
            "the pipeline stages of SGLang pull one after another, so the newest weights, or the "
            "released ones, may be others for each",
            "give the number of a `version` to `request`",
            field="version",
        )
    config = settings_of(order)
    device = str(next(model.parameters()).device)

    def read(contents: Sequence[str] | None) -> Catalogue:
        registry, engine = _connected(config)
        return read_catalogue(
            registry,
            engine,
            order.source,
            device=device,
            timeout_s=order.timeout_s,
            options=LoadOptions(version=order.version, contents=contents, verify=config.verify),
        )

    catalogue = read_one_content(group, read)
    load_weights: Any = model.load_weights
    for tensors in catalogue.by_group():
        load_weights(list(tensors.items()))
    return catalogue


@lru_cache(maxsize=1)
def _connected(config: IntegrationConfig) -> tuple[Registry, Engine]:
    """For all pulls: an engine over RDMA takes long to start."""
    registry = connect_registry(config)
    engine = start_engine_of(config, registry)
    atexit.register(registry.close)
    atexit.register(engine.close)
    return registry, engine
