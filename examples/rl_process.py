"""A process of rl_loop.py: a rank of the trainer, or a reader.

    python examples/rl_process.py rank NUMBER …    trains, and offers a snapshot after each step
    python examples/rl_process.py reader …         copies each version that it sees

What it has to say are lines of JSON for the process that has started it. It leaves at the end of
its input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine_loader import (
    LoadOptions,
    PublishOptions,
    Snapshots,
    load_module,
    open_engine,
    publish_state_dict,
)
from engine_registry import EngineRegistryError, InstanceState, ModelIdentity, Registry, Watch

WORDS, WIDTH, LAYERS = 2048, 256, 4
CHECKPOINT_STEPS = 4  # from one checkpoint of the trainer to the next


class Policy(nn.Module):
    """Small, and like a transformer's its weights are about 0.02."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, WORDS)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.embedding(words)
        for layer in self.layers:
            found = layer(found)
        likely: torch.Tensor = self.head(found).float().log_softmax(-1)  # each word, as logarithms
        return likely


# -- a rank of the trainer


def train(options: argparse.Namespace) -> None:
    rank, world_size, launch = options.number, options.world_size, options.launch
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.folder}/launch-{launch}",
        rank=rank,
        world_size=world_size,
    )
    torch.manual_seed(0)  # all ranks begin with the same weights
    policy = Policy()
    in_bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in policy.layers:
        fully_shard(layer, mp_policy=in_bf16)
    fully_shard(policy, mp_policy=in_bf16)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    begun = resume(policy, optimizer, options.folder)
    offered = {name: one.to(torch.bfloat16) for name, one in policy.state_dict().items()}
    with (
        Registry.connect(options.etcd) as registry,
        open_engine(options.host, options.protocol) as engine,
        publish_state_dict(
            registry,
            engine,
            offered,
            instance="trainer",
            rank=rank,
            world_size=world_size,
            model=ModelIdentity("policy"),
            options=PublishOptions(
                generation=f"launch {launch}",  # no reader sees ranks of two launches as one
                version=begun,
                snapshots=Snapshots(count=3, deltas=4),
            ),
        ) as publication,
    ):
        tell(version=begun, digest=digest_of({name: own(one) for name, one in offered.items()}))
        for step in range(begun + 1, options.steps + 1):
            torch.manual_seed(1000 * step + 10 * launch + rank)  # other rollouts in each launch
            learn(policy, optimizer)
            share = write(policy, offered)
            digest = digest_of({name: own(one) for name, one in offered.items()})
            tell(version=step, digest=digest, share=share)
            publication.snapshot()
            if step % CHECKPOINT_STEPS == 0:
                model, adam = get_state_dict(policy, optimizer)
                state = {"policy": model, "optimizer": adam, "step": step}
                state_dict_saver.save(state, checkpoint_id=f"{options.folder}/step-{step}")
        sys.stdin.read()  # until all readers have the last version
    dist.destroy_process_group()


def learn(policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """One step of policy gradients, with rewards out of thin air."""
    words = torch.randint(0, WORDS, (2, 32))
    chosen = torch.randint(0, WORDS, words.shape)
    rewards = torch.randn(2, 1)
    likely = policy(words).gather(-1, chosen[..., None])[..., 0]
    (-rewards * likely).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def write(policy: nn.Module, offered: Mapping[str, Any]) -> float:
    """The weights as they are now, to what is offered. Returns the share that has changed."""
    changed = total = 0
    for name, weight in policy.state_dict().items():
        before, now = own(offered[name]), own(weight).to(torch.bfloat16)
        changed += int((before != now).sum())
        total += now.numel()
        before.copy_(now)
    return changed / total


def own(tensor: Any) -> torch.Tensor:
    """The rows of a DTensor that this rank has."""
    rows: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return rows


def resume(policy: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> int:
    """Goes back to the last checkpoint, if there is one. Returns its step."""
    saved = [int(path.parent.name[5:]) for path in Path(folder).glob("step-*/.metadata")]
    if not saved:
        return 0
    model, adam = get_state_dict(policy, optimizer)
    state = {"policy": model, "optimizer": adam}
    state_dict_loader.load(state, checkpoint_id=f"{folder}/step-{max(saved)}")
    set_state_dict(policy, optimizer, model_state_dict=model, optim_state_dict=adam)
    return max(saved)


# -- a reader


def read(options: argparse.Namespace) -> None:
    policy = Policy().to(torch.bfloat16)
    contents: tuple[str, ...] | None = None  # of what the policy holds
    with (
        Registry.connect(options.etcd) as registry,
        open_engine(options.host, options.protocol) as engine,
        registry.watch("trainer") as watch,
    ):
        threading.Thread(target=stop_at_end_of_input, args=(watch,), daemon=True).start()
        while not watch.stopped:
            watch.next(timeout_s=1.0)
            trainer = registry.instance("trainer")
            # By contents: a trainer that begins again gives its old numbers to other weights.
            same = set(trainer.contents) == set(contents or ())
            if trainer.state is not InstanceState.READY or same:
                continue
            try:
                report = load_module(
                    registry,
                    engine,
                    "trainer",
                    policy,
                    timeout_s=10.0,
                    options=LoadOptions(base=contents),
                )
            except EngineRegistryError as exc:  # the trainer has ended: the next one is awaited
                tell(trouble=str(exc))
                continue
            contents = report.contents
            tell(
                version=report.version,
                digests=digests_of(policy, options.world_size),
                how=f"{report.seconds * 1000:4.0f} ms, {report.delta_nbytes:7d} bytes of deltas, "
                f"{report.read_nbytes:7d} bytes of weights, together "
                f"{(report.delta_nbytes + report.read_nbytes) / report.nbytes:.1%}",
            )


def stop_at_end_of_input(watch: Watch) -> None:
    sys.stdin.read()
    watch.stop()


def digests_of(policy: nn.Module, world_size: int) -> list[str]:
    """Of what each rank of the trainer has of these tensors: as FSDP2 divides them."""
    weights = policy.state_dict().items()
    return [
        digest_of({name: one.chunk(world_size)[rank] for name, one in weights})
        for rank in range(world_size)
    ]


# -- all of them


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tell(**said: object) -> None:
    """A line for the process that has started this one."""
    print(json.dumps(said), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("role", choices=("rank", "reader"))
    parser.add_argument("number", type=int)
    parser.add_argument("--etcd", default="127.0.0.1:2379")
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine")
    parser.add_argument("--protocol", default="socket", help="how readers read")
    parser.add_argument("--world-size", type=int, default=2, help="how many ranks the trainer has")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--launch", type=int, default=1, help="how often the trainer was started")
    parser.add_argument("--folder", help="where the trainer has its checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.role == "reader":
        read(options)
        return
    try:
        train(options)
    except RuntimeError as exc:  # another rank has ended
        tell(trouble=f"cannot go on: {exc}".partition(". ")[0])
        sys.exit(1)


if __name__ == "__main__":
    main()
