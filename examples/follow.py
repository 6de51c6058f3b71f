"""A server that loads each new version of the trainer in train.py, until the trainer leaves."""

from __future__ import annotations

import argparse

from torch import nn

from engine_loader import MooncakeEngine, load_module
from engine_registry import EngineRegistryError, InstanceGone, InstanceState, Registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine")
    options = parser.parse_args()
    server = nn.Linear(256, 256)
    loaded = -1
    with (
        Registry.connect(options.etcd) as registry,
        MooncakeEngine(options.host) as engine,
        registry.watch("trainer") as watch,
    ):
        for event in watch:
            if isinstance(event, InstanceGone):
                return
            status = registry.instance("trainer")
            if (
                status.state is not InstanceState.READY
                or status.version is None
                or status.version <= loaded
            ):
                continue
            try:
                report = load_module(registry, engine, "trainer", server, timeout_s=5.0)
            except (
                EngineRegistryError
            ) as exc:  # the trainer was quicker, or left: the next event says
                print(f"not loaded: {exc}", flush=True)
                continue
            loaded = report.version
            print(f"loaded version {report.version}, content {report.content}", flush=True)


if __name__ == "__main__":
    main()
