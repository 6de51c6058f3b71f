"""What happens to published weights when vLLM changes them: they are paused before, and published
anew after. What vLLM has compiled is published when it has warmed up.

The methods of vLLM's workers are wrapped once a process, and only where our loader or our transfer
of weights is used. The workers call them one at a time.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from engine_loader.integrations.serving import Served, served_models

_WORKER = "vllm.v1.worker.gpu_worker"
_COMPILING = "engine_loader.integrations.vllm.compiling"
_MARK = "_engine_registry_wraps"
_DISCARDS = 2  # the level of sleep that does not keep the weights


def install() -> bool:
    """Wraps the methods of the workers that this process has. False where vLLM has others."""
    module = sys.modules.get(_WORKER)
    worker = getattr(module, "Worker", None)
    if worker is None:
        return False
    wanted = {
        "sleep": _sleep,
        "wake_up": _wake_up,
        "discard": _discard,
        "reset_weights": _reset,
        "reload_weights": _reload,
        "start_weight_update": _begin,
        "start_draft_weight_update": _begin,
        "update_weights": _update,
        "finish_weight_update": _end,
        "compile_or_warm_up_model": _warm_up,
        "execute_model": _compute,
        "sample_tokens": _compute,
        "shutdown": _shut_down,
    }
    if not all(callable(getattr(worker, name, None)) for name in ("sleep", "reload_weights")):
        return False
    for kind in _with_subclasses(worker):
        for name, around in wanted.items():
            if name in vars(kind) and not hasattr(vars(kind)[name], _MARK):
                setattr(kind, name, _wrapped(vars(kind)[name], around))
    return True


class Remembers(Protocol):
    """What knows which weights a model has."""

    def forget(self) -> None:
        """They are others now."""


_LEFT: list[Served] = []  # what is collected is withdrawn
_TOLD: weakref.WeakSet[Remembers] = weakref.WeakSet()


def tell(one: Remembers) -> None:
    """From now on it is told when weights become others than by an update from a trainer."""
    _TOLD.add(one)


def forget_all() -> None:
    """Weights become others, or are thrown away."""
    for one in list(_TOLD):
        one.forget()


def pause_all() -> None:
    """Peers wait, or go elsewhere."""
    for served in served_models():
        served.pause()


def publish_all() -> None:
    """The weights of all models of this process, as they are now, as the next version."""
    for served in served_models():
        served.republish()


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    for below in type.__subclasses__(kind):
        yield from _with_subclasses(below)


Around = Callable[[Callable[[], Any], dict[str, Any]], Any]


def _wrapped(method: Callable[..., Any], around: Around) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {"self": self, **kwargs}
        if args:
            given["first"] = args[0]
        return around(lambda: method(self, *args, **kwargs), given)

    setattr(wrapper, _MARK, True)
    return wrapper


def _warm_up(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    done = act()
    compiling = sys.modules.get(_COMPILING)  # imported with our loader, and with vLLM
    if compiling is not None:
        compiling.publish_compile_cache()
    return done


def _sleep(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    pause_all()
    discards = given.get("level", given.get("first", 1)) >= _DISCARDS
    if discards:
        forget_all()
    for served in served_models():
        served.discarded = discards
    return act()


def _wake_up(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    done = act()
    tags = given.get("tags", given.get("first"))
    if tags is None or "weights" in tags:
        for served in served_models():
            if not served.discarded:  # else they come with a reload or an update
                served.resume()
    return done


def _discard(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    return _reset(act, given) if "weights" in given.get("tags", given.get("first", ())) else act()


def _reset(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    pause_all()
    forget_all()
    for served in served_models():
        served.discarded = True
    return act()


def _reload(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    pause_all()
    forget_all()
    done = act()
    publish_all()
    return done


def _shut_down(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    """A stop ends the registrations. After an error they end with the process, as after a kill: so
    the weights are held, where that is set.
    """
    error = sys.exc_info()[0]
    if error is not None and issubclass(error, Exception):
        _leave_all()
    for served in served_models():
        if not served.left:
            served.close()
    return act()


def _compute(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    """An error here ends the engine, which then stops its workers as it does at any other time."""
    try:
        return act()
    except Exception:
        _leave_all()
        raise


def _leave_all() -> None:
    for served in served_models():
        if not served.left:
            served.left = True
            _LEFT.append(served)


def _begin(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    pause_all()
    return act()


def _update(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    """Where all workers fail, one of them says so. vLLM reads answers up to the first error, so
    that of a later worker would be taken for its answer to the next call.
    """
    worker = given["self"]
    try:
        return act()
    except Exception:
        last = worker.vllm_config.parallel_config.world_size - 1
        if worker.weight_transfer_engine.all_failed and worker.rank != last:
            return None
        raise


def _end(act: Callable[[], Any], given: dict[str, Any]) -> Any:
    done = act()
    publish_all()
    return done
