"""The start of an inference engine on a GPU: from a process that runs the same model there.

A torch module with vLLM's parameters stands in for vLLM: fused and padded, fp8 with scales of
blocks, transposed views and views with gaps. Where vLLM itself is installed, it runs too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from engine_registry.etcd.local import LocalEtcd
from tests.support.checkout import ROOT
from tests.support.vllm_layers import Model, checkpoint
from tests.support.vllm_start import process, start_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(params=["tcp", "nvlink_intra", "cuda_ipc"])
def settings(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    with LocalEtcd() as etcd:
        yield {"etcd": etcd.endpoint, "host": "127.0.0.1", "protocol": request.param}


def expected(rank: int, size: int, stage: str) -> Model:
    model = Model(rank, size)
    model.load_weights(checkpoint())
    if stage == "processed":
        process(model)
    return model


@pytest.mark.parametrize(
    ("stage", "ranks"), [("loaded", 1), ("loaded", 2), ("loaded", 4), ("processed", 1)]
)
def test_each_rank_copies_its_part_of_every_tensor_from_a_process_on_the_gpu(
    settings: dict[str, str], stage: str, ranks: int
) -> None:
    source = subprocess.Popen(
        [sys.executable, "-m", "tests.support.vllm_start", json.dumps(settings), stage, "cuda"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert source.stdout is not None
        assert source.stdout.readline() == "disk\n"
        for rank in range(ranks):
            joiner = start_rank(
                settings, "joiner", rank=rank, size=ranks, stage=stage, device="cuda", seed=1
            )
            assert joiner.source == "peers"
            wanted = dict(expected(rank, ranks, stage).named_parameters())
            for name, tensor in joiner.model.named_parameters():
                assert tensor.stride() == wanted[name].stride()
                assert torch.equal(tensor.cpu().float(), wanted[name].float()), name
            joiner.start.close()
    finally:
        source.communicate()


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: a module with its parameters ran")
@pytest.mark.timeout(1800)
def test_a_real_vllm_copies_from_another_on_the_gpu() -> None:
    program = [sys.executable, "-m", "benchmarks.vllm_start", "--python", sys.executable]
    done = subprocess.run(
        [*program, "--rounds", "1", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peer_nbytes"] > 0
