"""A trainer that changes its published weights in place, step by step."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from engine_loader import MooncakeEngine, publish_state_dict
from engine_registry import ModelIdentity, Registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address of this machine that loaders connect to"
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two steps")
    options = parser.parse_args()
    policy = nn.Linear(256, 256)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with (
        Registry.connect(options.etcd) as registry,
        MooncakeEngine(options.host) as engine,
        publish_state_dict(
            registry,
            engine,
            policy.state_dict(),
            instance="trainer",
            rank=0,
            world_size=1,
            model=ModelIdentity("policy"),
        ) as publication,
    ):
        for _ in range(options.steps):
            policy(torch.randn(32, 256)).square().mean().backward()
            with publication.update():  # readers know from here on that the weights change
                optimizer.step()
            optimizer.zero_grad()
            print(f"version {publication.version}, content {publication.content}", flush=True)
            time.sleep(options.pause)
        publication.drain(timeout_s=30)


if __name__ == "__main__":
    main()
