"""Compiles a small function with the cache of Inductor in FOLDER: `compiled FOLDER`.

It prints what torch counts, as JSON: graphs that it has found in its cache, and that it has missed.
"""

from __future__ import annotations

import json
import os
import sys


def main(folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    import torch
    from torch._dynamo.utils import counters

    compiled = torch.compile(lambda x, y: torch.relu(x @ y).softmax(-1) * 2 + y.sin())
    compiled(torch.ones(64, 64), torch.ones(64, 64))
    graphs = counters["inductor"]
    print(json.dumps([graphs["fxgraph_cache_hit"], graphs["fxgraph_cache_miss"]]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
