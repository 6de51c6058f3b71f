"""What tests and benchmarks ask the workers of a vLLM. Each function runs in all of them."""

from __future__ import annotations

from typing import Any


def facts(worker: Any) -> list[dict[str, Any]]:
    """Of all models of the worker that serve peers, or have paused."""
    from engine_loader.integrations.serving import served_models
    from engine_loader.integrations.starting import ModelStart

    return [one.outcome().facts() for one in served_models() if isinstance(one, ModelStart)]


def compile_caches(worker: Any) -> list[dict[str, Any]]:
    """What the worker's compile cache says, if it copies it from peers."""
    from engine_loader.integrations.vllm.compiling import compile_cache_facts

    return compile_cache_facts()


def transferred(worker: Any) -> Any:
    """The version that the worker has taken from a trainer."""
    return worker.weight_transfer_engine.version


def last_update(worker: Any) -> dict[str, Any]:
    """What the worker's transfer of weights says of its last update."""
    transfer = worker.weight_transfer_engine
    return {name: getattr(transfer, name) for name in ("version", "pause_s", "load_s", "changed")}
