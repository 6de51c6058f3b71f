"""The processes of `benchmarks.fanout`: the seed, and receivers, each on a separate host. They take
orders in lines of JSON on standard input, and answer each with one.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import click
import torch

from benchmarks.processes import ready
from engine_cli.options import engine_log
from engine_loader import LoadOptions, MooncakeEngine, Pace, Progress, Publication, load, publish
from engine_loader.transfer.pace import pace_for, pace_in_chain
from engine_registry import ModelIdentity, Registry

MODEL = ModelIdentity("fanout", "r1")
SEED = "seed"
_TENSORS = 64


def chain_pace(nbytes: int) -> Pace:
    """What a load has that passes on what has come."""
    return pace_in_chain(pace_for("tcp"), nbytes)


def seed(endpoint: str, address: str, nbytes: str) -> None:
    """Says the digest of its weights, and serves them until its input ends."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: tensor.random_(0, 256, generator=generator)
        for name, tensor in _empty(int(nbytes)).items()
    }
    with (
        engine_log(),
        Registry.connect(endpoint) as registry,
        MooncakeEngine(address) as engine,
        publish(
            registry, engine, instance=SEED, rank=0, world_size=1, tensors=tensors, model=MODEL
        ),
    ):
        ready(_digest_of(tensors))


def receive(endpoint: str, address: str, instance: str, nbytes: str) -> None:
    """Loads, one time after another.

    Each has four orders: get ready, load from that source, send the digest, leave.
    """
    tensors = _empty(int(nbytes))
    # as small a part in each strategy
    pace = replace(pace_for("tcp"), chunk_nbytes=chain_pace(int(nbytes)).chunk_nbytes)
    with engine_log():
        for _ in sys.stdin:
            with Registry.connect(endpoint) as registry, MooncakeEngine(address) as engine:
                for tensor in tensors.values():
                    tensor.zero_()
                _answer()
                with _load(
                    json.loads(sys.stdin.readline()), registry, engine, instance, tensors, pace
                ):
                    sys.stdin.readline()
                    _answer(digest=_digest_of(tensors))
                    sys.stdin.readline()
            _answer()


def _load(
    order: Mapping[str, Any],
    registry: Registry,
    engine: MooncakeEngine,
    instance: str,
    tensors: dict[str, torch.Tensor],
    pace: Pace,
) -> Publication:
    """From the instance that is named; or, where none is, from any ranks of the model, while
    others read what has come.
    """
    progress = _until(order["die_at"]) if order["die_at"] is not None else None
    if order["source"] is not None:
        load(
            registry,
            engine,
            order["source"],
            rank=0,
            tensors=tensors,
            options=LoadOptions(pace=pace, progress=progress),
        )
        ended = time.monotonic()
        publication = publish(
            registry, engine, instance=instance, rank=0, world_size=1, tensors=tensors, model=MODEL
        )
    else:
        report = load(
            registry,
            engine,
            MODEL,
            rank=0,
            tensors=tensors,
            options=LoadOptions(pace=pace, progress=progress),
            publish=instance,
        )
        ended = time.monotonic()
        if report.publication is None:
            raise click.ClickException("a load that was to publish has not")
        publication = report.publication
    _answer(ended=ended)
    return publication


def _until(die_at: float) -> Callable[[Progress], None]:
    """This process is killed when that share of the weights has come."""

    def look(progress: Progress) -> None:
        if progress.nbytes >= die_at * progress.total_nbytes:
            os.kill(os.getpid(), signal.SIGKILL)

    return look


def _answer(**what: object) -> None:
    click.echo(json.dumps(what))


def _empty(nbytes: int) -> dict[str, torch.Tensor]:
    return {
        f"t{number}": torch.zeros(nbytes // _TENSORS, dtype=torch.uint8)
        for number in range(_TENSORS)
    }


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
