"""Every rank's record and manifest: from etcd, and as SGLang's bootstrap server gives them."""

from __future__ import annotations

import json
import urllib.request

from benchmarks.bootstrap import GET, HOST, bootstrap_server
from benchmarks.figures import Results, median_s
from engine_registry import Registry


def resolve_with_manifests(registry: Registry, ranks: int, results: Results) -> None:
    """What the HTTP server gives: every rank's record and manifest."""

    def all_of_them() -> None:
        for record in registry.resolve("i00"):
            registry.manifest(record)

    results[f"resolve_{ranks}_ranks_and_their_manifests_s"] = median_s(all_of_them, 3)


def bootstrap(ranks: int, results: Results) -> None:
    """A loader asks one server for one rank after another, over HTTP."""
    weights = {f"model.layers.{n // 9}.w{n % 9}": [4096 + n * 65536, 32768, 2] for n in range(100)}
    infos = {rank: ["10.0.0.1:15000", weights] for rank in range(ranks)}
    with bootstrap_server(infos) as port:

        def ask_all() -> None:
            for rank in range(ranks):
                with urllib.request.urlopen(f"http://{HOST}:{port}{GET}{rank}") as answer:
                    json.load(answer)

        results[f"http_server_{ranks}_ranks_s"] = median_s(ask_all, 3)
