"""What an integration connects and starts, from the settings of its user."""

from __future__ import annotations

from engine_loader.engines.base import Engine
from engine_loader.engines.mooncake.engine import MooncakeEngine
from engine_loader.integrations.config import IntegrationConfig
from engine_registry import Registry


def connect_registry(config: IntegrationConfig) -> Registry:
    """Asks etcd nothing yet, so it may be away."""
    return Registry.connect(
        config.etcd,
        namespace=config.namespace,
        cacert=config.cacert,
        cert=config.cert,
        key=config.key,
        user=config.user,
        password=config.password,
        lazy=True,
    )


def start_mooncake(config: IntegrationConfig, registry: Registry) -> Engine:
    """The transfer engine of the settings. Raises EngineUnavailable."""
    return MooncakeEngine(
        config.host or registry.local_address(),
        protocol=config.protocol,
        device=config.device,
        fabric=config.fabric,
    )
