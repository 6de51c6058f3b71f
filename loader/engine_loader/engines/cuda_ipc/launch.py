"""Copies that a GPU has begun to make."""

from __future__ import annotations

from typing import Protocol

import torch

from engine_loader.errors import EngineFailed


class Launch(Protocol):
    """Copies that a GPU makes."""

    def done(self) -> bool:
        """Whether they have been made; EngineFailed where the GPU has failed. Never waits."""

    def wait(self) -> None:
        """Until they have been made."""


class Made:
    """Copies that have been made."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Launched:
    """Copies on a stream, as an event after them shows."""

    def __init__(self, event: torch.cuda.Event, held: list[object]) -> None:
        self._event = event
        self._held = held  # what the GPU reads and adds to, until it is done

    def done(self) -> bool:
        if not self._held:
            return True
        try:
            done = self._event.query()
        except RuntimeError as exc:
            raise _gpu_failed(exc) from exc
        if done:
            self._held.clear()
        return bool(done)

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as exc:
            raise _gpu_failed(exc) from exc


def _gpu_failed(exc: RuntimeError) -> EngineFailed:
    line = next(iter(str(exc).splitlines()), type(exc).__name__)
    return EngineFailed(
        f"the GPU has failed while it read ({line})",
        "this process cannot use it any more: start it again",
    )
