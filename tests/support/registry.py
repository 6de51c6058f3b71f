"""The registry of the test that has started this program."""

from __future__ import annotations

import os

from engine_registry import Registry


def connect(timeout_s: float = 60.0) -> Registry:
    """In the namespace of the test; its environment says which."""
    endpoint, namespace = os.environ["ENGINES_ETCD"], os.environ["TEST_NAMESPACE"]
    return Registry.connect(endpoint, namespace=namespace, timeout_s=timeout_s)
