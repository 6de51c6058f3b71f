"""A rank that publishes the weights of a torch module until Ctrl-C."""

from __future__ import annotations

import argparse
import signal

import torch
from torch import nn

from engine_loader import MooncakeEngine, publish
from engine_registry import ModelIdentity, Registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--instance", default="demo")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address of this machine that loaders connect to"
    )
    options = parser.parse_args()
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    with (
        Registry.connect(options.etcd) as registry,
        MooncakeEngine(options.host) as engine,
        publish(
            registry,
            engine,
            instance=options.instance,
            rank=0,
            world_size=1,
            tensors=module.state_dict(),
            model=ModelIdentity("example"),
        ) as publication,
    ):
        print(f"serving {publication.record.key}, content {publication.content}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            publication.drain(timeout_s=10)


if __name__ == "__main__":
    main()
