"""Fills a module that has no memory yet from the rank that serve_module.py publishes."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from engine_loader import MooncakeEngine, load_module
from engine_registry import Registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--instance", default="demo")
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine")
    options = parser.parse_args()
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    with Registry.connect(options.etcd) as registry, MooncakeEngine(options.host) as engine:
        report = load_module(registry, engine, options.instance, module)
    print(f"{report.nbytes} bytes in {report.seconds:.3f} s, content {report.content}")


if __name__ == "__main__":
    main()
