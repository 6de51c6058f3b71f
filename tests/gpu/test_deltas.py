"""Deltas of tensors on a GPU: the same bytes as elsewhere, and applied there too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine_loader.deltas.apply import apply
from engine_loader.deltas.blocks import as_integers
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import capacity_of
from engine_loader.tensors.regions import describe
from tests.support.deltas import AFTER, BEFORE, bytes_of, delta, sections_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SHARES = {"same": 0, "few": 0.0005, "some": 0.02, "half": 0.5, "all": 1}
DTYPES = {"w": torch.bfloat16, "x": torch.float8_e4m3fn, "y": torch.float32, "z": torch.complex128}


def versions(share: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """In the host's memory; the first tensor has several blocks."""
    before = {
        name: torch.zeros(4096, 4096 if name == "w" else 33, dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    for tensor in after.values():
        flat = as_integers(tensor)
        flat[torch.rand(flat.shape) < share] = 1
    return before, after


@pytest.mark.parametrize("share", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize("pinned", [True, False], ids=["to the host", "on the GPU"])
def test_a_gpu_writes_the_delta_that_the_host_writes(share: float, pinned: bool) -> None:
    before, after = versions(share)
    entries = describe(after).tensors
    old, new = ({name: one.cuda() for name, one in side.items()} for side in (before, after))
    buffer = torch.zeros(
        capacity_of(entries),
        dtype=torch.uint8,
        device="cpu" if pinned else "cuda",
        pin_memory=pinned,
    )
    encoded = encode(entries, old, new, buffer, BEFORE, AFTER)
    assert encoded is not None
    assert bytes(buffer[: encoded.nbytes].cpu().numpy()) == delta(entries, before, after)


@pytest.mark.parametrize("share", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "columns"])
def test_a_delta_is_applied_on_a_gpu(share: float, whole: bool) -> None:
    before, after = versions(share)
    entries = [replace(entry, opaque=False) for entry in describe(after).tensors]
    data = delta(entries, before, after)
    ours = {
        name: (one if whole else one[:, 9:30]).contiguous().cuda() for name, one in before.items()
    }
    for name, section in sections_of(data, entries).items():
        (src,) = [entry for entry in entries if entry.name == name]
        (dst,) = describe({name: ours[name]}).tensors
        if not whole:
            dst = replace(dst, global_shape=src.shape, offsets=(0, 9), opaque=False)
        apply(bytes_of(data, section), section, src, ours[name], dst)
    for name, one in after.items():
        wanted = (one if whole else one[:, 9:30]).contiguous()
        assert torch.equal(as_integers(ours[name].cpu()), as_integers(wanted))
