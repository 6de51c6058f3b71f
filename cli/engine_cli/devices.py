"""The option `--device`: which RDMA devices a transfer engine uses."""

from __future__ import annotations

import click

from engine_registry.errors import InvalidField


def complete_devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """The devices of this machine that are not named yet, after those that are; and auto."""
    from engine_loader.engines.mooncake.choice import AUTO
    from engine_loader.engines.mooncake.devices import rdma_devices

    before, comma, begun = incomplete.rpartition(",")
    named = before.split(",")
    names = [device.name for device in rdma_devices() if device.name not in named]
    return [
        f"{before}{comma}{name}"
        for name in [*names, *([] if comma else [AUTO])]
        if name.startswith(begun)
    ]


device_option = click.option(
    "--device",
    default="",
    metavar="NAMES",
    shell_complete=complete_devices,
    help="With --protocol rdma: the devices, as in mlx5_0,mlx5_1; or auto, those nearest to the "
    "memory. Default: all.",
)


def check_device(device: str, protocol: str) -> None:
    """InvalidField where devices are named that the protocol does not use."""
    if device and protocol != "rdma":
        raise InvalidField(
            f"--device goes with --protocol rdma, and {protocol} uses no RDMA device",
            "say --protocol rdma, or leave --device out",
            field="device",
        )
