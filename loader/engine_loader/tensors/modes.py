"""Our own work on tensors stays apart from the modes of torch that the caller is in.

Used by all of `loader` that makes tensors or writes to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def plain_torch() -> Iterator[None]:
    """Tensors made inside are normal ones with memory, on the device that was stated.

    Inference mode, gradients, fake tensors and default devices of the caller have no effect inside.
    Each thread has its own modes. A tensor that was made in inference mode can be read inside,
    and written to through a new tensor over its storage.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield
