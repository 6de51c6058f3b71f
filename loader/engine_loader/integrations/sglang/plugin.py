"""What `register` changes in a process of SGLang.

SGLang imports `sglang.private.private_model_loader` for `--load-format private`, which no release
has. A finder that comes after all others gives ours, so that a private build of SGLang keeps its
loader. Imports neither torch nor SGLang before SGLang asks.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence

log = logging.getLogger(__name__)
SETTINGS = "ENGINE_REGISTRY"  # an environment variable: settings for SGLang's own transfer
_SCHEDULERS, _BEFORE = "sglang.srt.managers.scheduler", "init_model_worker"
_PACKAGE = "sglang.private"
_MODULE = f"{_PACKAGE}.private_model_loader"


class PrivateLoader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives SGLang the module of its private loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Of the package and of its one module."""
        if name not in (_PACKAGE, _MODULE):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name == _PACKAGE)

    def exec_module(self, module: types.ModuleType) -> None:
        """Imports the loader, which imports SGLang and torch."""
        if module.__name__ == _MODULE:
            from engine_loader.integrations.sglang.loader import PeerModelLoader

            module.PrivateModelLoader = PeerModelLoader  # type: ignore[attr-defined]


def install_safely() -> None:
    """Once. A failure is one warning: SGLang starts without this library."""
    _safely(_install)


def _install() -> None:
    if not any(isinstance(finder, PrivateLoader) for finder in sys.meta_path):
        sys.meta_path.append(PrivateLoader())
    scheduler = getattr(sys.modules.get(_SCHEDULERS), "Scheduler", None)
    if not hasattr(scheduler, _BEFORE):
        return  # a process without weights, or another release
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    target = f"{_SCHEDULERS}.Scheduler.{_BEFORE}"
    if not HookRegistry._hooks.get(target):
        HookRegistry.register(target, _before_model, HookType.BEFORE)


def _before_model(*_: object) -> None:
    """In a scheduler, which makes its model next: what holds weights is hooked. Other processes of
    SGLang do not even import it.
    """
    _safely(_hook)


def _hook() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    from engine_loader.integrations.sglang.updates import hook_updates

    hook_updates()
    try:
        if settings := os.environ.get(SETTINGS, "").strip():
            from engine_loader.integrations.sglang.bootstrap import hook_transfer

            hook_transfer(decode_settings(settings))
    finally:
        HookRegistry.apply_hooks()


def _safely(act: Callable[[], None]) -> None:
    try:
        act()
    except Exception as exc:  # noqa: BLE001  SGLang must not fail to start because of us
        from engine_registry.telemetry.logs import fields

        log.warning(
            "engine_registry is not used in SGLang: %s",
            exc,
            extra=fields("plugin_failed", error=exc),
        )


def decode_settings(text: str) -> object:
    """Of the environment variable. InvalidField where it is no JSON."""
    from engine_registry.errors import InvalidField

    try:
        return json.loads(text)
    except ValueError as exc:
        raise InvalidField(
            f"{SETTINGS} is no JSON: {exc}",
            'give a mapping, such as {"etcd": "10.0.0.5:2379"}',
            field=SETTINGS,
        ) from None
