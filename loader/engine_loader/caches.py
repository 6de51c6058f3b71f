"""How much a process keeps of its loads, so that the next one begins sooner."""

from __future__ import annotations

from engine_loader.planning.plan import KEPT_PLANS, keep_plans
from engine_loader.sources.manifests import KEPT_TENSORS, keep_manifests
from engine_registry.schema.numbers import whole


def limit_caches(*, plans: int = KEPT_PLANS, manifest_tensors: int = KEPT_TENSORS) -> None:
    """Set what this process keeps between loads, from now on.

    A load keeps its plan and the manifests of its sources. The next load of the same ranks into the
    same tensors takes them from memory. They are only ever used for equal manifests.

    Args:
        plans: The number of plans; a plan of 100,000 tensors takes some 50 MB.
        manifest_tensors: The number of tensors in all manifests together; 100,000 take some 50 MB.
            0 keeps none, and drops those that are kept, as it does for `plans`.

    Raises:
        InvalidField: A number is negative, or is no whole number.

    Example:
        `limit_caches(plans=0, manifest_tensors=0)` in a process that loads once.
    """
    plans, manifest_tensors = whole("plans", plans), whole("manifest_tensors", manifest_tensors)
    keep_plans(plans)
    keep_manifests(manifest_tensors)
