"""What a command has to wait for, said at once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import click

from engine_cli import logs
from engine_cli.render.printable import printable
from engine_cli.suggestions import near_instances
from engine_registry import InstanceState, Registry
from engine_registry.errors import InstanceIncomplete, InstanceNotFound
from engine_registry.telemetry.logs import fields

log = logging.getLogger(__name__)
_WORTH_SAYING_S = 1.0


def say_why_to_wait(registry: Registry, instances: Sequence[str], wait_s: float) -> None:
    """On stderr, if none of the instances is ready now.

    Raises what `Registry.ready` raises where waiting does not help.
    """
    if wait_s < _WORTH_SAYING_S:
        return
    try:
        registry.ready(instances, 0)
    except (InstanceNotFound, InstanceIncomplete) as exc:
        hint = near_instances(registry, instances) if isinstance(exc, InstanceNotFound) else ""
        said = f"waiting up to {wait_s:.3g} s: {exc.what}{f' ({hint})' if hint else ''}"
        if logs.as_json():
            log.warning("%s", said, extra=fields("load_waits", timeout_s=wait_s, error=exc))
        else:
            _echo(said)


def say_if_not_there(registry: Registry, instance: str) -> None:
    """On stderr, if no rank of the instance is registered, which a watch may wait for."""
    if registry.instance(instance).state is InstanceState.GONE:
        hint = near_instances(registry, [instance])
        said = f"instance {instance!r} is not registered now{f' ({hint})' if hint else ''}"
        if logs.as_json():
            log.warning("%s", said, extra=fields("watch_waits", instance=instance))
        else:
            _echo(said)


def _echo(text: str) -> None:
    click.echo(f"engines: {printable(text)}", err=True)
