"""A small stand-in for SGLang: its registry of hooks, and its context of one process."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class HookRegistry:
    """Remembers what is registered, and applies nothing."""

    _hooks: dict[str, list[Any]]
    _patched: set[str]

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], kind: str) -> None:
        cls._hooks.setdefault(target, []).append((kind, hook, None))

    @classmethod
    def apply(cls) -> None:
        cls._patched.update(cls._hooks)


class Group:
    """One rank of a tensor-parallel group that another has given what it said."""

    def __init__(self, rank: int = 0, size: int = 1, said: object = None) -> None:
        self.rank_in_group = rank
        self.world_size = size
        self.cpu_group = None
        self.said = said

    def broadcast_object(self, value: object, src: int) -> object:
        if self.rank_in_group == src:
            self.said = value
        return self.said


class Process:
    """What SGLang knows in a process."""

    def __init__(self) -> None:
        self.parallel = SimpleNamespace(
            tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, tp_group=Group(), world_group=Group()
        )
        self.model = SimpleNamespace(load_format="auto", model_loader_extra_config="{}")
        self.exec = SimpleNamespace(features=SimpleNamespace(enable_weights_cpu_backup=False))
