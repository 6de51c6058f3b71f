"""`IntegrationConfig`: the settings that a user gives to an engine as one mapping in JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from engine_loader.options import LoadOptions, Verify
from engine_registry.errors import InvalidField
from engine_registry.schema.labels import check_labels
from engine_registry.schema.numbers import MAX_TTL_S, seconds
from engine_registry.schema.record import PROTOCOLS

Stage = Literal["auto", "loaded", "processed"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "protocol": PROTOCOLS,
    "stage": get_args(Stage),
    "verify": get_args(Verify),
}


@dataclass(frozen=True, kw_only=True)
class IntegrationConfig:
    """How an engine finds its peers, loads from them and serves them.

    Attributes:
        etcd: The endpoints of etcd, `HOST:PORT[,HOST:PORT…]`.
        namespace: What stands before every key in etcd.
        cacert: The file of etcd's certificate authority.
        cert: The file of this client's certificate.
        key: The file of the certificate's key.
        user: The user of etcd.
        password: The password of that user.
        model: The name under which peers know the model. Empty: the engine's name of it.
        revision: The revision of the weights. Empty: the engine's, or that of its checkpoint. Give
            each fine-tune a revision: peers with equal names and revisions serve each other.
        instance: What the instance's name begins with. Empty: the engine's name.
        labels: Names and values by which people find the instance. None: none.
        host: The address of this machine for peers. Empty: the one on the way to etcd.
        protocol: How peers read: tcp, socket, rdma, cuda_ipc or nvlink_intra.
        device: Over rdma: names of devices, with commas between them; `"auto"`, those nearest to
            the GPU; or empty, all.
        fabric: A label of the network. Engines with equal labels reach each other.
        location: Where this machine stands: `ZONE[/RACK[/NODE]]`. Empty: it is not known.
        stage: Which memory is served: `"loaded"`, as the checkpoint's loader fills it; or
            `"processed"`, as the engine computes with it. `"auto"` lets the integration choose.
        reshard: Whether peers of other parallel sizes count, where the engine says which part of
            the model each tensor is. Only vLLM does.
        timeout_s: How many seconds to wait for a peer that reads the weights.
        without_etcd_s: How many seconds to wait for an etcd that is away.
        required: Whether the engine fails to start where something of this library fails.
        verify: `"header"`; `"digest"`, to compare every tensor with the digest of its source; or
            `"auto"`, as in LoadOptions.
        fallback_format: The load format of the engine's own loader, which reads the checkpoint.
        artifacts: Whether the engine copies its compile cache from peers before it compiles, and
            serves it after. A text is the folder of the cache, where it is not the engine's own.
            Only vLLM does.
        mirror: Whether updates from a trainer are loaded into the host's memory while the engine
            serves, where there is room for all of the trainer's tensors, for each rank.
        hold_s: For how many seconds the weights stay in memory after the engine has died, for the
            engine that is started in its place on this host. 0: they go with it. What an engine
            that died has left is taken in any case.

    Raises:
        InvalidField: A value is not valid; `details["field"]` names it.

    Example:
        `IntegrationConfig.of({"etcd": "10.0.0.5:2379", "protocol": "rdma"})`
    """

    etcd: str = "127.0.0.1:2379"
    namespace: str = ""
    cacert: str | None = None
    cert: str | None = None
    key: str | None = None
    user: str | None = None
    password: str | None = None
    model: str = ""
    revision: str = ""
    instance: str = ""
    labels: Mapping[str, str] | None = None
    host: str = ""
    protocol: str = "tcp"
    device: str = ""
    fabric: str = ""
    location: str = ""
    stage: Stage = "auto"
    reshard: bool = True
    timeout_s: float = 600.0
    without_etcd_s: float = 30.0
    required: bool = False
    verify: Verify = "auto"
    fallback_format: str = "auto"
    artifacts: bool | str = False
    mirror: bool = False
    hold_s: float = 0.0

    @classmethod
    def of(cls, values: object) -> IntegrationConfig:
        """The settings in a mapping that was decoded from JSON. None is an empty one.

        Raises:
            InvalidField: It is no mapping, or has unknown keys, or a value is not valid.
        """
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise InvalidField(
                f"the configuration of engine_registry {values!r} is not valid",
                f"give a mapping with some of the keys {_known(cls)}",
                field="config",
            )
        if unknown := sorted(str(key) for key in values if key not in _names(cls)):
            raise InvalidField(
                "the configuration of engine_registry has "
                + ("an unknown key: " if len(unknown) == 1 else "unknown keys: ")
                + ", ".join(unknown),
                f"known are {_known(cls)}",
                field=unknown[0],
            )
        return cls(**values)

    def __post_init__(self) -> None:
        """Raises InvalidField."""
        for one in fields(self):
            _check(one.name, str(one.type), getattr(self, one.name))
        if self.labels is not None:
            object.__setattr__(self, "labels", check_labels(self.labels))
        for name in ("timeout_s", "without_etcd_s"):
            object.__setattr__(self, name, seconds(name, getattr(self, name)))
        object.__setattr__(self, "hold_s", seconds("hold_s", self.hold_s, most=MAX_TTL_S))
        if (self.user is None) != (self.password is None):
            raise InvalidField(
                "etcd authentication needs both a user and a password",
                "give `user` and `password`",
                field="user",
            )

    @property
    def load_options(self) -> LoadOptions:
        """For a load from peers."""
        return LoadOptions(verify=self.verify)


def _names(cls: type[IntegrationConfig]) -> list[str]:
    return [one.name for one in fields(cls)]


def _known(cls: type[IntegrationConfig]) -> str:
    return ", ".join(sorted(_names(cls)))


def _check(name: str, kind: str, value: Any) -> None:
    """Never shows a password."""
    if name in _CHOICES:
        good, expected = value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}"
    elif kind == "bool | str":
        good = isinstance(value, bool) or (isinstance(value, str) and bool(value))
        expected = "true, false or a folder"
    elif kind == "bool":
        good, expected = isinstance(value, bool), "true or false"
    elif kind == "float" or name == "labels":
        return  # `seconds` and `check_labels` say it
    elif kind == "str":
        good, expected = isinstance(value, str), "a text"
    else:
        good, expected = value is None or isinstance(value, str), "a text"
    if not good:
        shown = "" if name == "password" else f" {value!r}"
        raise InvalidField(
            f"`{name}`{shown} in the configuration of engine_registry is not valid: it is "
            f"{expected}",
            field=name,
        )
