"""A replica that follows an instance and passes deltas on: `relay NAME SOURCE WIDTH`.

It has one tensor `w` of WIDTH x WIDTH in bfloat16. Prints `version N` once it serves. Each line on
standard input makes it load what the source has then, and print `read DELTA_NBYTES READ_NBYTES`.
Ends with its input, or killed.
"""

from __future__ import annotations

import sys

import torch

from engine_loader import LoadOptions, PublishOptions, Replica, load
from tests.support.registry import connect
from tests.support.transfer import engine_at


def main(name: str, source: str, width: str) -> None:
    tensors = {"w": torch.zeros(int(width), int(width), dtype=torch.bfloat16)}
    replica = Replica(name, options=PublishOptions(ttl_s=3.0, deltas=2))
    with connect() as registry, engine_at("127.0.0.1") as engine:
        report = load(registry, engine, source, rank=0, tensors=tensors, publish=replica)
        publication = report.publication
        if publication is None:
            raise AssertionError("the load has published nothing")
        with publication:
            print("version", report.version, flush=True)
            for _ in sys.stdin:
                options = LoadOptions(base=report.contents)
                with publication.update():
                    report = load(
                        registry, engine, source, rank=0, tensors=tensors, options=options
                    )
                print("read", report.delta_nbytes, report.read_nbytes, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
