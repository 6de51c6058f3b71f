"""Where a process of SGLang stands: its world rank, and its place along each parallel axis.

SGLang numbers the ranks inside of a tensor-parallel group, and the groups by pipeline stage. Of
dense data-parallel replicas each is an instance for itself. Imports nothing of SGLang.
"""

from __future__ import annotations

from typing import Any

from engine_registry import Place

# How weights are split inside of a tensor-parallel group: our names, and those of SGLang, which has
# an attribute `<axis>_rank` and `<axis>_size` for each.
_INNER = {
    "ep": "moe_ep",
    "moe_tp": "moe_tp",
    "moe_dp": "moe_dp",
    "attn_tp": "attn_tp",
    "attn_cp": "attn_cp",
    "attn_dp": "attn_dp",
}


def place_of(parallel: Any) -> Place:
    """The place of the process, as the registry counts it.

    Args:
        parallel: SGLang's parallel context.

    Returns:
        The world rank `pp_rank * tp_size + tp_rank`, the world size, and the place along each axis.
    """
    tp = int(parallel.tp_rank), int(parallel.tp_size)
    pp = int(parallel.pp_rank), int(parallel.pp_size)
    inner = {name: _axis(parallel, theirs) for name, theirs in _INNER.items()}
    return Place(
        rank=pp[0] * tp[1] + tp[0],
        world_size=tp[1] * pp[1],
        topology={"tp": tp, "pp": pp}
        | {name: axis for name, axis in inner.items() if axis[1] not in (1, tp[1])},
    )


def expert_of(parallel: Any) -> tuple[int, int]:
    """The index of the rank among those that share the experts, and how many they are."""
    return _axis(parallel, "moe_ep")


def _axis(parallel: Any, name: str) -> tuple[int, int]:
    """One place where SGLang does not know the axis, or has not set it up."""
    try:
        size = int(getattr(parallel, f"{name}_size"))
        return (int(getattr(parallel, f"{name}_rank")), size) if size > 1 else (0, 1)
    except (AttributeError, RuntimeError):
        return 0, 1
