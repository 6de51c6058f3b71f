"""What is read into buffers is copied to tensors of a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine_loader.planning.boxes import Lines
from engine_loader.transfer.staging import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def neighbours() -> list[torch.Tensor]:
    """Two whose memory lies one after the other, as torch's allocator gives it to small ones."""
    some = sorted(
        [torch.zeros(512, dtype=torch.uint8, device="cuda") for _ in range(100)],
        key=torch.Tensor.data_ptr,
    )
    return next(
        [one, other]
        for one, other in itertools.pairwise(some)
        if one.data_ptr() + 512 == other.data_ptr()
    )


@pytest.mark.parametrize("pinned", [False, True])
def test_a_run_of_bytes_may_cross_tensors_that_are_neighbours(pinned: bool) -> None:
    tensors = neighbours()
    device = torch.device("cpu" if pinned else "cuda")
    staging = Staging(tensors, device, 1, 4096, pinned)
    buffer = staging.take()
    assert buffer is not None
    wanted = torch.arange(1024).to(torch.uint8)
    staging._memory[:1024].copy_(wanted)
    staging.copy(buffer, [Lines(100, tensors[0].data_ptr() + 100, 900)])
    found = torch.cat(tensors).cpu()
    assert torch.equal(found[100:1000], wanted[100:1000])
    assert not found[:100].any()
    assert not found[1000:].any()
