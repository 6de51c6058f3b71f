"""Inside SGLang, unmodified: its weights come from peers, and go to peers.

SGLang finds `register` by the entry point `sglang.srt.plugins`, and calls it in each of its
processes. Importing this package imports neither torch nor SGLang.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engine_loader.options import Version

__all__ = ["pull", "register", "request"]


def register() -> None:
    """Lets SGLang find this library. Any number of times; never raises.

    Nothing changes in SGLang until it is started with `--load-format private`, or with settings in
    the environment variable `ENGINE_REGISTRY`.
    """
    from engine_loader.integrations.sglang.plugin import install_safely

    install_safely()


def pull(model: nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Fills the weights of a running SGLang from whoever publishes them, in any layout.

    SGLang calls it for `--custom-weight-loader engine_loader.integrations.sglang.pull`, when
    `update_weights_from_tensor` comes with this path as `load_format`. One layer at a time comes,
    all of one content.

    Args:
        model: The model of SGLang.
        named_tensors: What `request` returns. They say where the weights come from.

    Raises:
        InvalidField: The tensors are not those of `request`.
        RegistryError: The source is not found.
        LoaderError: The weights cannot be loaded.
    """
    from engine_loader.integrations.sglang.pulling import pull_into

    pull_into(model, named_tensors)


def request(
    source: str,
    *,
    version: Version | None = None,
    timeout_s: float = 60.0,
    wait: bool = True,
    **settings: Any,
) -> list[tuple[str, torch.Tensor]]:
    """What `update_weights_from_tensor` takes as `named_tensors`, for `pull`.

    Args:
        source: The instance that publishes the weights.
        version: The version to pull. None pulls the newest, `"released"` the one that its trainer
            has released. SGLang with pipeline stages needs a number, as the stages pull one after
            another.
        timeout_s: How many seconds to wait for the source.
        wait: Whether SGLang loads in the pull what its mirror does not have yet. If not, the pull
            fails then, and the weights stay as they were. Without a mirror it has no effect.
        settings: Settings such as `etcd`, in place of those that SGLang was started with.

    Returns:
        The request, as the name of an empty tensor.

    Raises:
        InvalidField: A setting is unknown or not valid.
    """
    from engine_loader.integrations.sglang.order import Order

    return Order(source, version, timeout_s, settings, wait).encode()
