"""SGLang's HTTP interface over the registry: what `engines gateway` runs. Any number of gateways
serve the same ranks.

A gateway has no state: ranks and manifests are in etcd, with a mark of those that gateways keep.
`gateway.service` starts the threads.
"""

from __future__ import annotations

from ipaddress import ip_address

from engine_registry.client import Registry
from engine_registry.errors import InvalidField
from engine_registry.gateway.claims import Served
from engine_registry.gateway.limits import Limits
from engine_registry.gateway.listener import listen
from engine_registry.gateway.mirror import check_url
from engine_registry.gateway.service import Service, ServiceConfig
from engine_registry.gateway.token import check_token
from engine_registry.lifetime import Closable
from engine_registry.schema.keys import check_instance, check_rank
from engine_registry.schema.numbers import MAX_TTL_S, MIN_TTL_S, seconds
from engine_registry.schema.record import ModelIdentity

PORT = 6789  # of SGLang's own server


class Gateway(Closable):
    """Serves from the end of `__init__` to `close`, or the end of the `with` block."""

    def __init__(
        self,
        registry: Registry,
        instance: str,
        *,
        world_size: int = 1,
        model: str | None = None,
        host: str = "127.0.0.1",
        port: int = PORT,
        ttl_s: float = 60.0,
        probe_interval_s: float = 2.0,
        probe_tolerance: int = 3,
        token: str | None = None,
        allow_anonymous: bool = False,
        seed_url: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        """`instance`, of `world_size` ranks, is what the paths without a name serve. `port` 0 takes
        a free one.

        `ttl_s` is for how long the ranks of seeds stay while no gateway runs. `seed_url` is a
        server of SGLang's whose ranks are to be registered as those of `instance`. Without a
        `token`, clients may register only if `host` is a loopback address, or with
        `allow_anonymous`. Raises InvalidField, or GatewayFailed where the port cannot be had.
        """
        check_instance(instance)
        check_rank(0, world_size)
        served = Served(instance, ModelIdentity(model or instance).name, world_size)
        ttl_s = seconds("ttl_s", ttl_s, MIN_TTL_S, MAX_TTL_S)
        if not 0 < probe_interval_s <= ttl_s / 3 or probe_tolerance < 0:
            raise InvalidField(
                f"probe interval {probe_interval_s:g} s, tolerance {probe_tolerance} are not "
                "valid: the interval is more than 0 "
                f"and at most a third of the TTL ({ttl_s / 3:g} s), the tolerance 0 or more",
                field="probe_interval_s",
            )
        check_token(token)
        if seed_url is not None:
            check_url(seed_url)
        listener = listen(host, port, "perhaps by SGLang itself, which has the same default")
        self.host, self.port = listener.getsockname()[:2]
        config = ServiceConfig(
            registry.config,
            served,
            ttl_s,
            probe_interval_s,
            probe_tolerance,
            token,
            token is not None or allow_anonymous or ip_address(self.host).is_loopback,
            seed_url,
            limits or Limits(),
        )
        self._service = Service(config, listener)
        self._mark_open()

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it has ended by `close`, or by itself, which raises why; False where the time is
        over first.
        """
        return self._service.wait(timeout_s)

    def stop(self) -> None:
        """From any thread: `wait` returns when it has ended."""
        self._service.stop()

    def close(self) -> None:
        """Any number of times.

        Answers the requests that have come, for up to 2 s; ranks of seeds stay until their TTL is
        over.
        """
        self._mark_closed()
        self._service.close()

    def _label(self) -> str:
        return f"on port {self.port}"
