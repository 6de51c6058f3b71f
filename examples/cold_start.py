"""One of many processes that start together: the first reads the file, the others copy."""

from __future__ import annotations

import argparse

import torch
from safetensors import safe_open

from engine_loader import MooncakeEngine, load_or_seed
from engine_registry import ModelIdentity, Registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", help="a safetensors file")
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--instance", required=True, help="another name for each process")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address of this machine that loaders connect to"
    )
    options = parser.parse_args()
    with safe_open(options.weights, framework="pt") as file:
        tensors = {name: torch.empty_like(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  it is no mapping
    with (
        Registry.connect(options.etcd) as registry,
        MooncakeEngine(options.host) as engine,
        load_or_seed(
            registry,
            engine,
            ModelIdentity("cold-start"),
            tensors,
            rank=0,
            world_size=1,
            instance=options.instance,
            fallback=options.weights,
        ) as seeded,
    ):
        where = seeded.report.instance if seeded.report is not None else options.weights
        print(f"{options.instance} has its weights from {where}; press Enter to leave", flush=True)
        input()


if __name__ == "__main__":
    main()
