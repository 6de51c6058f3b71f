"""Digests of tensors on a GPU: the same as elsewhere, whichever way they are computed."""

from __future__ import annotations

import pytest
import torch

from engine_loader.digests import table
from engine_loader.digests.table import digests_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SIZES = [0, 1, 4, 7, 1000, 4096, (4 << 20) - 4, 4 << 20, (4 << 20) + 4, (16 << 20) + 8]


@pytest.mark.parametrize("kernel", [True, False], ids=["by the kernel", "without it"])
def test_a_tensor_on_a_gpu_has_the_digest_that_it_has_in_the_host(
    monkeypatch: pytest.MonkeyPatch, kernel: bool
) -> None:
    if not kernel:
        monkeypatch.setattr(table, "_fits_kernel", lambda _: False)
    here = {nbytes: torch.randint(0, 256, (nbytes,), dtype=torch.uint8) for nbytes in SIZES}
    there = {nbytes: tensor.cuda() for nbytes, tensor in here.items()}
    assert digests_of(there, "multilinear_64", blocks=True) == digests_of(
        here, "multilinear_64", blocks=True
    )
    unaligned = torch.zeros(1001, dtype=torch.uint8, device="cuda")[1:].copy_(here[1000])
    assert digests_of(there, "multilinear_64") == digests_of(here, "multilinear_64")
    assert digests_of({1000: unaligned}, "multilinear_64") == digests_of(
        {1000: here[1000]}, "multilinear_64"
    )


def test_the_kernel_can_be_had(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "engine_loader.digests.table"):
        digests_of({"w": torch.zeros(1 << 20, device="cuda")}, "multilinear_64")
    assert caplog.messages == []
