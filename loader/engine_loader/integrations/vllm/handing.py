"""`Handing`: what a model of vLLM takes from a mirror. At first that is everything, and later the
layers of which a tensor has changed.

vLLM's reload fills and processes one module at a time, from all of its weights. So a layer of the
checkpoint is handed as a whole or not at all. Which parts of the model that fills is seen the first
time, in what vLLM's reload counts and what `load_weights` returns.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any

from torch import nn
from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from engine_loader.loading.mirror import Mirror
from engine_loader.planning.layers import layer_of

Group = tuple[str, ...]  # the names of a layer's tensors


class Handing:
    """What one model has taken from mirrors.

    Attributes:
        changed: How many tensors were handed the last time.
    """

    def __init__(self) -> None:
        self.changed = 0
        self._digests: dict[str, bytes] = {}  # of what the model has
        self._parts: dict[Group, frozenset[str]] = {}  # the parts of the model that each fills

    def forget(self) -> None:
        """The model's weights are others than those that it was handed."""
        self._digests, self._parts = {}, {}

    def hand(self, model: Any, mirror: Mirror, partly: bool) -> bool:
        """Hands the model what it does not have. False if that is nothing: then vLLM's reload is
        not begun. After a failure the caller has to `forget`.

        Args:
            model: The model, whose reload has not begun.
            mirror: What it takes.
            partly: Whether layers that have not changed may be left out.
        """
        chosen = self._chosen(mirror) if partly else None
        self.changed = sum(map(len, mirror.groups if chosen is None else chosen))
        if chosen is None:
            initialize_layerwise_reload(model)
            self._parts = self._hand_all(model, mirror)
        else:
            for part in sorted(set().union(*[self._parts[group] for group in chosen])):
                initialize_layerwise_reload(model.get_submodule(part))
            for group in chosen:
                model.load_weights(_tensors(mirror, group))
        self._digests = dict(mirror.digests)
        return self.changed > 0

    def _chosen(self, mirror: Mirror) -> list[Group] | None:
        """The groups with a tensor that has changed, and those that fill parts of the model with
        them. None if these are not all known.
        """
        if self._parts.keys() != set(mirror.groups):
            return None
        changed = {
            group
            for group in mirror.groups
            if any(self._digests.get(name) != mirror.digests[name] for name in group)
        }
        return _closed(changed, mirror.groups, self._parts)

    def _hand_all(self, model: Any, mirror: Mirror) -> dict[Group, frozenset[str]]:
        """The parts that each group fills; nothing where one is no module for itself."""
        found: dict[Group, frozenset[str]] = {}
        before = _progress(model)
        for group in mirror.groups:
            loaded = model.load_weights(_tensors(mirror, group))
            after = _progress(model)
            modules = [name for name, state in after.items() if state != before[name]]
            if isinstance(loaded, Set):
                modules += [name.rpartition(".")[0] for name in loaded]
            found[group] = frozenset(layer_of(name) or name for name in modules)
            before = after
        known = all(_has(model, part) for parts in found.values() for part in parts)
        return found if known else {}


def _tensors(mirror: Mirror, group: Group) -> list[tuple[str, Any]]:
    return [(name, mirror.tensors[name]) for name in group]


def _progress(model: nn.Module) -> dict[str, tuple[bool, int]]:
    """How far vLLM's reload is with each module, which has weights left to load or not."""
    infos = {name: get_layerwise_info(module) for name, module in model.named_modules()}
    return {name: (info.can_load(), info.load_numel) for name, info in infos.items()}


def _has(model: nn.Module, part: str) -> bool:
    """The model itself is no part that could be reloaded alone."""
    try:
        model.get_submodule(part)
    except AttributeError:
        return False
    return bool(part)


def _closed(
    chosen: Collection[Group], groups: Sequence[Group], parts: dict[Group, frozenset[str]]
) -> list[Group]:
    """The chosen groups, and all others that fill the same modules; in order. Pure."""
    taken = set(chosen)
    while True:
        modules = [part for group in taken for part in parts[group]]
        more = {
            group
            for group in groups
            if group not in taken
            and any(_overlap(one, other) for one in parts[group] for other in modules)
        }
        if not more:
            return [group for group in groups if group in taken]
        taken |= more


def _overlap(one: str, other: str) -> bool:
    """Whether one module is the other, or in it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
