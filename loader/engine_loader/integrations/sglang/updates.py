"""Changes of the weights while SGLang runs: peers wait, or read elsewhere, until they are whole
again as the next version.

Whatever changes weights in SGLang goes through its `WeightUpdater`: in a session from `begin` to
`end`, or at once. Memory may also be released meanwhile. The methods are hooked by SGLang's own
registry of hooks, in processes that serve their weights.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_exec
from torch import nn

from engine_loader.integrations.sglang.pulling import PullFailed
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
T = TypeVar("T")
Outcome = tuple[bool, str]
_RUNNER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_WEIGHTS = "weights"  # SGLang's tag of their memory


class Served(Protocol):
    """A model whose weights peers read."""

    def pause(self) -> None:
        """Before a change."""

    def resume(self) -> None:
        """The weights are as they were."""

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """They are others now."""

    def close(self) -> None:
        """Serves them no more."""


class Changes:
    """The changes of one served model."""

    def __init__(
        self, served: Served, tensors: Callable[[], Mapping[str, torch.Tensor] | None]
    ) -> None:
        """`tensors` gives those to serve after a change; None where there are none any more."""
        self._served = served
        self._tensors = tensors
        self._in_session = False
        self._in_doubt = False
        self._ended = False

    def begin(self) -> None:
        """A session begins."""
        self._in_session, self._in_doubt = True, False
        if not self._ended:
            self._served.pause()

    def step(self, change: Callable[[], T]) -> T:
        """A change in a session, or for itself."""
        if self._in_session:
            return self._watched(change)
        self.begin()
        try:
            return self._watched(change)
        finally:
            self.end()

    def end(self) -> None:
        """The session ends. After a change that failed peers go on waiting."""
        self._in_session = False
        if self._ended:
            return
        if self._in_doubt:
            log.warning(
                "peers do not get these weights until an update of them succeeds, because the "
                "last one failed",
                extra=fields("weights_in_doubt"),
            )
            return
        tensors = self._tensors()
        if tensors is None:
            log.warning(
                "the updated weights are not served to peers: SGLang has other memory for them "
                "after its post-processing",
                extra=fields("update_unserved"),
            )
            self._ended = True
            self._served.close()
        else:
            self._served.replace(tensors)

    def release(self) -> None:
        """The memory goes away."""
        if not self._ended:
            self._served.pause()

    def restore(self, same: bool) -> None:
        """The memory is back, with the `same` bytes, or with none that mean anything."""
        if same and not (self._in_session or self._in_doubt or self._ended):
            self._served.resume()

    def _watched(self, change: Callable[[], T]) -> T:
        try:
            result = change()
        except BaseException:
            self._in_doubt = True
            raise
        if isinstance(result, tuple) and result and result[0] is False:
            self._in_doubt = True
        return result


_CHANGES: weakref.WeakKeyDictionary[nn.Module, Changes] = weakref.WeakKeyDictionary()


def follow_updates(model: nn.Module, changes: Changes) -> None:
    """From now on peers do not read what SGLang is changing."""
    _CHANGES[model] = changes


def hook_updates() -> None:
    """Once a process; SGLang applies the hooks next."""
    for target, hook in _HOOKS.items():
        if not HookRegistry._hooks.get(target):
            HookRegistry.register(target, hook, HookType.AROUND)


def updates_are_hooked() -> bool:
    """Whether SGLang has applied the hooks: another release may have other methods."""
    return _HOOKS.keys() <= set(HookRegistry._patched)


def moves_experts() -> bool:
    """Whether SGLang exchanges experts between ranks by itself."""
    return bool(get_exec().moe.enable_eplb)


def _begin(original: Callable[..., T], updater: Any, *args: Any, **kwargs: Any) -> T:
    changes = _CHANGES.get(updater.get_model())
    if changes is not None:
        changes.begin()
    return original(updater, *args, **kwargs)


def _end(original: Callable[..., T], updater: Any, *args: Any, **kwargs: Any) -> T:
    changes = _CHANGES.get(updater.get_model())
    result = original(updater, *args, **kwargs)
    if changes is not None:
        changes.end()
    return result


def _step(original: Callable[..., T], updater: Any, *args: Any, **kwargs: Any) -> T | Outcome:
    changes = _CHANGES.get(updater.get_model())

    def change() -> T | Outcome:
        try:
            return original(updater, *args, **kwargs)
        except PullFailed as exc:
            return False, str(exc)  # raised, it would end SGLang

    return changes.step(change) if changes is not None else change()


def _release(original: Callable[..., T], manager: Any, request: Any) -> T:
    if _has_weights(request):
        for changes in list(_CHANGES.values()):
            changes.release()
    return original(manager, request)


def _resume(original: Callable[..., T], manager: Any, request: Any) -> T:
    result = original(manager, request)
    if _has_weights(request):
        for changes in list(_CHANGES.values()):
            changes.restore(same=bool(get_exec().features.enable_weights_cpu_backup))
    return result


def _has_weights(request: Any) -> bool:
    return not request.tags or _WEIGHTS in request.tags


_HOOKS: dict[str, Callable[..., Any]] = {
    f"{_RUNNER}.begin_weight_update": _begin,
    f"{_RUNNER}.end_weight_update": _end,
    f"{_RUNNER}.update_weights_from_tensor": _step,
    f"{_RUNNER}.load_weights_from_distributed": _step,
    f"{_RUNNER}.update_weights_from_disk": _step,
    f"{_RUNNER}.update_weights_from_ipc": _step,
    f"{_MANAGER}.release_memory_occupation": _release,
    f"{_MANAGER}.resume_memory_occupation": _resume,
}
