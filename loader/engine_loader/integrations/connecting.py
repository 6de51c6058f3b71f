"""What an integration connects and starts, from the settings of its user."""

from __future__ import annotations

from collections.abc import Callable

from engine_loader.engines.base import Engine
from engine_loader.engines.opening import open_engine
from engine_loader.integrations.config import IntegrationConfig
from engine_registry import Registry
from engine_registry.lifetime import Closable

Connect = Callable[[IntegrationConfig], Registry]
StartEngine = Callable[[IntegrationConfig, Registry], Engine]


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


def start_engine_of(config: IntegrationConfig, registry: Registry) -> Engine:
    """The transfer engine of the settings. Raises EngineUnavailable."""
    return open_engine(
        config.host or registry.local_address(),
        protocol=config.protocol,
        device=config.device,
        fabric=config.fabric,
        location=config.location,
    )


class Connection(Closable):
    """The registry and the transfer engine of a model, each made when it is first needed."""

    def __init__(
        self,
        config: IntegrationConfig,
        connect: Connect = connect_registry,
        start_engine: StartEngine = start_engine_of,
    ) -> None:
        """Neither connects nor starts anything."""
        self._config = config
        self._connect = connect
        self._start_engine = start_engine
        self._registry: Registry | None = None
        self._engine: Engine | None = None

    @property
    def registry(self) -> Registry:
        """It asks etcd nothing before its first use. Raises InvalidField."""
        if self._registry is None:
            self._registry = self._connect(self._config)
            self._mark_open()
        return self._registry

    @property
    def engine(self) -> Engine:
        """Raises EngineUnavailable."""
        if self._engine is None:
            self._engine = self._start_engine(self._config, self.registry)
        return self._engine

    def close(self) -> None:
        """Closes what was made. Then it can be used anew."""
        engine, registry = self._engine, self._registry
        self._engine = self._registry = None
        self._mark_closed()
        if engine is not None:
            engine.close()
        if registry is not None:
            registry.close()
