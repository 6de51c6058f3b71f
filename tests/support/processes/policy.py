"""A trainer of `tests.support.vllm_reload`'s checkpoint, as instance `t`, in snapshots without
deltas. Each line on standard input names a tensor, or `all`, and makes a version of which some of
its elements have changed. Ends with its input, or killed.
"""

from __future__ import annotations

import sys

from engine_loader import PublishOptions, Snapshots, SocketEngine, publish_state_dict
from engine_registry import ModelIdentity
from tests.support.registry import connect
from tests.support.vllm_reload import checkpoint


def main() -> None:
    state = checkpoint()
    with (
        connect() as registry,
        SocketEngine("127.0.0.1") as engine,
        publish_state_dict(
            registry,
            engine,
            state,
            instance="t",
            rank=0,
            world_size=1,
            model=ModelIdentity("policy"),
            options=PublishOptions(snapshots=Snapshots(count=2), digests=True, ttl_s=3.0),
        ) as publication,
    ):
        print("version 0", flush=True)
        for line in sys.stdin:
            for name in state if line.strip() == "all" else [line.strip()]:
                state[name].view(-1)[::100] += 1
            print("version", publication.snapshot(), flush=True)


if __name__ == "__main__":
    main()
