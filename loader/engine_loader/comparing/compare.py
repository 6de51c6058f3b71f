"""`compare`: whether running instances, and files, hold the same tensors."""

from __future__ import annotations

from collections.abc import Sequence

from engine_loader.comparing.comparison import Comparison, compare_holdings
from engine_loader.comparing.published import read_holding
from engine_loader.comparing.stored import stored_like
from engine_loader.engines.base import Engine
from engine_loader.files.folder import Paths
from engine_registry import InstanceState, RankRecord, Registry
from engine_registry.errors import InvalidField
from engine_registry.schema.numbers import seconds


def compare(
    registry: Registry,
    engine: Engine,
    instances: str | Sequence[str],
    *,
    files: Paths | None = None,
    timeout_s: float = 0.0,
) -> Comparison:
    """Compares the tensors of running instances by name, dtype, shape and digest. No weights move.

    Digests are those that the ranks have published, so they say what a rank held when it was
    published or updated last. `load` with `verify="digest"` says whether its memory still holds
    that. Ranks of one instance are compared where several hold the same part of a tensor.
    Instances that are cut in other ways are compared as whole tensors, without their bytes.

    Args:
        registry: Finds the instances.
        engine: Reads the digests.
        instances: The name of an instance, or several names.
        files: Safetensors files, or a folder of them, to compare the first instance with. Their
            digests are computed here, so layouts do not matter.
        timeout_s: How many seconds to wait until each instance is ready.

    Returns:
        What differs, and what could not be compared.

    Raises:
        InvalidField: No instance is named, or one twice.
        SourceUnreachable: This engine cannot read one of the ranks.
        SourceLost: A rank went away, or does not answer.
        TornRead: The weights of a rank changed meanwhile.
        WeightsFileInvalid: A file cannot be read.
        RegistryError: What `Registry.resolve` raises.

    Example:
        `compare(registry, engine, ["qwen-a", "qwen-b"]).same`
    """
    names = [instances] if isinstance(instances, str) else list(instances)
    if not names or len(set(names)) < len(names):
        raise InvalidField(
            f"instances {names} are not valid", "name each instance once", field="instances"
        )
    timeout_s = seconds("timeout_s", timeout_s)
    found = [registry.resolve(name, timeout_s) for name in names]
    sides = [read_holding(registry, engine, records) for records in found]
    if files is not None:
        sides.append(stored_like(files, sides[0]))
    return compare_holdings(sides)


def same_content(registry: Registry, records: Sequence[RankRecord]) -> list[str]:
    """The other instances that are ready and say that they hold the same as these ranks, which are
    those of one instance, by name.
    """
    contents = tuple(record.content for record in records)
    return [
        status.instance
        for status in registry.instances()
        if status.state is InstanceState.READY
        and status.contents == contents
        and status.instance != records[0].instance
    ]
