"""A trainer with FSDP2 whose weights a vLLM takes after each step, from the ranks' shards.

Start vLLM, then the ranks of the trainer:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --port 8000 \\
        --weight-transfer-config '{"backend": "engine_registry"}'
    torchrun --standalone --nproc-per-node 2 examples/fsdp_to_vllm.py \\
        --model MODEL --vllm http://127.0.0.1:8000

Each rank publishes the shards that it has. No rank gathers the model, and vLLM puts the tensors
together while it reads them.
"""

from __future__ import annotations

import argparse
import json
import urllib.request

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from engine_loader import MooncakeEngine, Publication, publish_state_dict
from engine_registry import ModelIdentity, Registry


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine")
    parser.add_argument("--model", help="a folder with a checkpoint; a small stand-in by default")
    parser.add_argument("--vllm", help="the URL of vLLM; without it nobody is asked to update")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    policy = new_policy(options.model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with (
        Registry.connect(options.etcd) as registry,
        MooncakeEngine(options.host) as engine,
        publish_state_dict(
            registry,
            engine,
            policy.state_dict(),
            instance="trainer",
            rank=rank,
            world_size=world_size,
            model=ModelIdentity("policy"),
        ) as publication,
    ):
        dist.barrier()  # all ranks are published
        if options.vllm and rank == 0:
            # vLLM may run elsewhere: it has to reach etcd, too
            ask(
                options.vllm,
                "init_weight_transfer_engine",
                init_info={"source": "trainer", "etcd": options.etcd},
            )
        for _ in range(options.steps):
            train(policy, optimizer, publication)
            dist.barrier()  # all ranks have this version
            if rank == 0:
                print(f"version {publication.version}", flush=True)
                if options.vllm:
                    update(options.vllm, publication.version)
            dist.barrier()  # vLLM has it, too
    dist.destroy_process_group()


def new_policy(model: str | None) -> nn.Module:
    """With a shard of each parameter on this rank."""
    torch.manual_seed(0)
    policy: nn.Module
    if model is None:
        policy = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64), nn.Tanh())
    else:
        from transformers import AutoModelForCausalLM

        policy = AutoModelForCausalLM.from_pretrained(model)
    fully_shard(policy, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return policy


def train(policy: nn.Module, optimizer: torch.optim.Optimizer, publication: Publication) -> None:
    """One step. Readers know that the weights change while the optimizer writes to them."""
    tokens = torch.randint(0, 100, (4, 16))
    found = policy(tokens)
    logits = found if isinstance(found, torch.Tensor) else found.logits
    logits.float().logsumexp(-1).mean().backward()
    with publication.update():
        optimizer.step()
    optimizer.zero_grad()


def update(vllm: str, version: int) -> None:
    """vLLM takes this version. It goes on with its requests before and after."""
    ask(vllm, "start_weight_update")
    ask(vllm, "update_weights", update_info={"version": version})
    ask(vllm, "finish_weight_update")
    ask(vllm, "reset_prefix_cache")  # what the former weights have computed


def ask(vllm: str, route: str, **body: object) -> None:
    url, headers = f"{vllm}/{route}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310
    urllib.request.urlopen(request, timeout=300).close()  # noqa: S310


if __name__ == "__main__":
    main()
