"""What a shell completes: the names of instances, and of their models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from engine_cli.connection import registry_of
from engine_registry.errors import EngineRegistryError

if TYPE_CHECKING:
    from engine_registry import InstanceStatus

_TIMEOUT_S = 1.0  # somebody has pressed a key


def complete_instances(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The names that begin so, in the etcd that the options before name."""
    names = [status.instance for status in _instances(ctx)]
    return [name for name in names if name.startswith(incomplete)]


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The models that begin so, of the instances there."""
    names = {str(status.model) for status in _instances(ctx) if status.model}
    return [name for name in sorted(names) if name.startswith(incomplete)]


def _instances(ctx: click.Context) -> Sequence[InstanceStatus]:
    """None where etcd is away: whoever completes a line is not told of errors."""
    try:
        with registry_of(ctx, _TIMEOUT_S) as registry:
            return registry.instances()
    except EngineRegistryError:
        return ()


instance_argument = click.argument("instance", shell_complete=complete_instances)
