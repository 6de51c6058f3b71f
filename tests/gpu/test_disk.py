"""Files are read into the memory of a GPU, through pinned buffers of the host's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine_loader import Shard
from engine_loader.files.disk import read_into

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_whole_tensors_slices_and_tensors_of_the_host_are_filled_in_one_read(
    tmp_path: Path,
) -> None:
    stored = {
        "long": torch.rand(5_000_000),
        "short": torch.rand(7).to(torch.bfloat16),
        "cut": torch.rand(64, 4096).to(torch.float16),
        "host": torch.rand(1000, 3),
        "scalar": torch.tensor(2.5),
    }
    save_file(stored, tmp_path / "model.safetensors")
    found = {
        name: torch.zeros_like(tensor, device="cpu" if name == "host" else "cuda")
        for name, tensor in stored.items()
    }
    found["cut"] = torch.zeros(64, 1024, dtype=torch.float16, device="cuda")
    report = read_into(tmp_path, found, shards={"cut": Shard((64, 4096), (0, 2048))})
    wanted = {**stored, "cut": stored["cut"][:, 2048:3072]}
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in wanted.items())
    assert report.nbytes == sum(tensor.nbytes for tensor in found.values())
