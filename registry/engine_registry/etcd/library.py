"""The client library etcd3 and its protobuf messages. `etcd.stubs` has to run before its import."""

from __future__ import annotations

import engine_registry.etcd.stubs  # noqa: F401  must come before etcd3

import etcd3  # isort: skip

pb = etcd3.etcdrpc

__all__ = ["etcd3", "pb"]
