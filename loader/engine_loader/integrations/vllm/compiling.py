"""vLLM's compile cache as an artifact: which folder, which key, and when.

vLLM keeps what it has compiled below VLLM_CACHE_ROOT/torch_compile_cache: a folder for each hash of
its configuration, or in `torch_aot_compile` for each hash of its ahead-of-time path. The caches of
Inductor and Triton are in there. A worker has one `CompileCache`, for all of its models.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm
from vllm import envs

from engine_loader.artifacts.here import artifact_key_here
from engine_loader.integrations.artifacts import CompileCache
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.logs import reason
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.vllm.describing import ENGINE, Ranks, cache_entry_of
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_WITHOUT_COMPILER = 0  # of vLLM's CompilationMode
_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
_CACHES: list[CompileCache] = []  # at most one: that of this worker
_CONFIGS: list[Any] = []


def pull_compile_cache(
    config: IntegrationConfig, vllm_config: Any, ranks: Ranks, seat: Seat
) -> None:
    """Before the worker compiles: once, and only if the user wants artifacts and vLLM compiles."""
    if not config.artifacts or _CACHES:
        return
    with _harmless():
        compiles = int(vllm_config.compilation_config.mode) != _WITHOUT_COMPILER
        if not compiles or envs.VLLM_DISABLE_COMPILE_CACHE:
            return
        folder = config.artifacts if isinstance(config.artifacts, str) else None
        cache = CompileCache(
            config,
            seat,
            ENGINE,
            Path(folder or Path(envs.VLLM_CACHE_ROOT, "torch_compile_cache")),
            lambda: key_of(vllm_config, ranks),
            entry_of=None if folder else cache_entry_of,
        )
        _CACHES.append(cache)
        _CONFIGS.append(vllm_config)
        cache.pull()


def publish_compile_cache() -> None:
    """After the worker has compiled and warmed up."""
    with _harmless():
        for cache, vllm_config in zip(_CACHES, _CONFIGS, strict=True):
            compiling = vllm_config.compilation_config
            used = [compiling.cache_dir, compiling.local_cache_dir]
            used += map(os.environ.get, _VARIABLES)
            cache.publish(filter(None, used), _graphs())


@contextmanager
def _harmless() -> Iterator[None]:
    """Of a vLLM that this library does not know anything may fail, and it starts all the same."""
    try:
        yield
    except Exception as exc:  # noqa: BLE001
        log.warning(
            "vLLM's compile cache is not copied: %s",
            reason(exc),
            extra=fields("artifacts_failed", error=exc),
        )


def _graphs() -> tuple[int, int] | None:
    """What torch counts in this process: of Inductor's cache, or where that is part of the cache
    of AOTAutograd, of the latter.
    """
    if "torch._dynamo.utils" not in sys.modules:
        return None
    counters = sys.modules["torch._dynamo.utils"].counters
    for layer, cache in (("inductor", "fxgraph_cache"), ("aot_autograd", "autograd_cache")):
        found, missed = (counters[layer][f"{cache}_{what}"] for what in ("hit", "miss"))
        if found or missed:
            return found, missed
    return 0, 0


def compile_cache_facts() -> list[dict[str, Any]]:
    """Of this worker, for tests and benchmarks."""
    return [cache.facts() for cache in _CACHES]


def key_of(vllm_config: Any, ranks: Ranks) -> dict[str, str]:
    """What vLLM's cache depends on. vLLM's own hashes stand for its configuration, the model's and
    the environment's.
    """
    from vllm.compilation.caching import aot_compile_hash_factors

    factors = str(aot_compile_hash_factors(vllm_config))
    parallel = vllm_config.parallel_config
    return {
        **artifact_key_here(str(vllm_config.device_config.device_type)),
        "vllm": str(vllm.__version__),
        "model": str(vllm_config.model_config.model)[-128:],
        "config": hashlib.sha256(factors.encode()).hexdigest()[:16],
        "rank": f"{ranks.rank}/{ranks.world_size}",
        "replica": str(parallel.data_parallel_index),
    }


@atexit.register
def _close_all() -> None:
    for cache in _CACHES:
        cache.close()
