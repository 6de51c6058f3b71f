"""The sums of `multilinear_64` for all tensors on a GPU in one launch. Called by `digests.table`,
which defines them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine_loader.kernels.kernel import Kernel

Numbers = npt.NDArray[np.int64]
_PARTS = (
    16  # of a block, each summed up by itself: a few tensors alone have to keep all of a GPU busy
)
KERNEL = Kernel("engine_loader.digests.kernel", "sum_blocks", (("PARTS", _PARTS),))


def sum_blocks(addrs: Numbers, counts: Numbers, device: torch.device) -> bytes:
    """Of blocks of device memory, at these addresses and of so many words of 32 bits: the sums, as
    64-bit words in a row. EngineFailed where there is no kernel.
    """
    where, words = torch.from_numpy(np.stack([addrs, counts])).to(device)
    sums = torch.zeros_like(where)
    with torch.cuda.device(device):
        KERNEL.launch(torch.cuda.current_stream(), (len(addrs), _PARTS), where, words, sums)
    return sums.cpu().numpy().tobytes()
