"""What tests ask the workers of a vLLM. Each function runs in all of them."""

from __future__ import annotations

from typing import Any


def facts(worker: Any) -> list[dict[str, Any]]:
    """Of all models of the worker that serve peers, or have paused."""
    from engine_loader.integrations.starting import open_starts

    return [start.facts() for start in open_starts()]


def transferred(worker: Any) -> Any:
    """The version that the worker has taken from a trainer."""
    return worker.weight_transfer_engine.version
