"""Makes stock etcd3 0.12 importable under protobuf 4 and later. Imported by `etcd.library` only,
before etcd3.

etcd3 ships message classes generated for protobuf 3, which newer protobuf refuses to load;
inference engines need newer protobuf. The descriptors inside those generated files are still good,
so the message classes are built from them again, in a separate descriptor pool: another
package's `rpc.proto` can neither clash with them nor be broken by them.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

_PACKAGE = "etcd3.etcdrpc"
_DESCRIPTOR = re.compile(
    r"""(?:serialized_pb=|AddSerializedFile\()(?:_b\()?(b?'(?:[^'\\]|\\.)*')"""
)
_PROTOS = ("kv", "auth", "rpc")  # in the order in which they depend on each other


def install() -> None:
    """Puts `etcd3.etcdrpc` into `sys.modules`, unless somebody has imported etcd3 already."""
    if _PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec("etcd3")
    if spec is None or spec.origin is None:
        raise ImportError("etcd3 is not installed: pip install 'etcd3==0.12.*'")
    folder = Path(spec.origin).parent / "etcdrpc"
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    modules = {_PACKAGE: package}
    pool = descriptor_pool.DescriptorPool()
    for proto in _PROTOS:
        module = _message_module(pool, folder, proto)
        modules[module.__name__] = module
        setattr(package, f"{proto}_pb2", module)
    sys.modules.update(modules)
    try:
        stubs = _load_stock(f"{_PACKAGE}.rpc_pb2_grpc", folder / "rpc_pb2_grpc.py")
    except BaseException:
        for name in modules:
            del sys.modules[name]
        raise
    for source in (modules[f"{_PACKAGE}.rpc_pb2"], stubs):
        vars(package).update(
            {name: value for name, value in vars(source).items() if not name.startswith("_")}
        )


def _message_module(pool: Any, folder: Path, proto: str) -> types.ModuleType:
    described = descriptor_pb2.FileDescriptorProto.FromString(
        _serialized_descriptor(folder / f"{proto}_pb2.py")
    )
    if hasattr(pool, "AddSerializedFile"):
        pool.AddSerializedFile(described.SerializeToString())
    else:
        pool.Add(described)
    file = pool.FindFileByName(f"{proto}.proto")
    module = types.ModuleType(f"{_PACKAGE}.{proto}_pb2")
    vars(module)["DESCRIPTOR"] = file
    factory: Any = message_factory
    message_class = (
        getattr(factory, "GetMessageClass", None) or factory.MessageFactory(pool).GetPrototype
    )
    for name, descriptor in file.message_types_by_name.items():
        setattr(module, name, message_class(descriptor))
    for name, descriptor in file.enum_types_by_name.items():
        setattr(module, name, enum_type_wrapper.EnumTypeWrapper(descriptor))
        for value in descriptor.values:
            setattr(module, value.name, value.number)
    return module


def _serialized_descriptor(path: Path) -> bytes:
    """The bytes that the generated file hands to protobuf, taken from its source without running
    it.

    Parsing the whole file would be simpler, but costs every process that imports etcd3 25 ms and 12
    MB.
    """
    literal = _DESCRIPTOR.search(path.read_text("utf-8"))
    if literal is None:
        raise ImportError(
            f"{path} holds no serialized descriptor: this etcd3 is not one of the 0.12 releases"
        )
    value = ast.literal_eval(literal[1])
    return value.encode("latin1") if isinstance(value, str) else bytes(value)


def _load_stock(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install()
