"""An engine that starts as an integration lets it: `engine INSTANCE STAGE DEVICE PROTOCOL SEED
BLOCKS HIDDEN`.

Its own loader makes the weights that SEED stands for. Prints what the start did and what the model
answers, as JSON. A line with a number on standard input makes it go on to the weights of that seed,
and print again. Ends with its input.
"""

from __future__ import annotations

import json
import os
import sys

import torch

from engine_cli.options import engine_log
from engine_loader.integrations.config import IntegrationConfig
from engine_loader.integrations.identity import EngineModel
from engine_loader.integrations.kept import Kept
from engine_loader.integrations.seat import Seat
from engine_loader.integrations.starting import ModelStart
from engine_loader.integrations.tensors import loaded_tensors, runtime_tensors
from engine_registry import Place
from tests.support.quantized_model import QuantizedModel


class Engine:
    def __init__(
        self, instance: str, stage: str, device: str, protocol: str, seed: int, size: list[int]
    ) -> None:
        self.stage, self.seed = stage, seed
        config = IntegrationConfig.of(
            {
                "etcd": os.environ["ENGINES_ETCD"],
                "namespace": os.environ["TEST_NAMESPACE"],
                "host": "127.0.0.1",
                "protocol": protocol,
                "required": True,
                "verify": "digest",
            }
        )
        identity = EngineModel(
            name="fused",
            engine="test",
            stage=stage,
            quantization="fp8",
            build={"device": device} if stage == "processed" else {},
        ).identity()
        self.start = ModelStart(config, identity, Seat(instance, instance, Place(0, 1)))
        self.device, self.size = torch.device(device), size
        self.model = self._new_model()

    def _new_model(self) -> QuantizedModel:
        with self.device:
            return QuantizedModel(*self.size)

    def run(self) -> None:
        if self.stage == "loaded":
            tensors = loaded_tensors(self.model)
            self.start.fill(tensors, lambda: self.model.read(self.seed))
            kept = Kept(tensors)
            self.model.process()
            self.start.publish(self.model, kept.tensors)
        else:
            self.start.fill(self._dry_run, self._read_and_process)
            self.start.publish(self.model, runtime_tensors(self.model), runtime_tensors)

    def update(self, seed: int) -> None:
        """The weights of another step, in memory that is new."""
        self.start.pause()
        other = self._new_model()
        other.read(seed)
        other.process()
        vars(self.model).update(vars(other))
        self.start.republish()

    def report(self) -> None:
        facts = self.start.outcome().facts()
        served = (
            self.start.publication.record.manifest.nbytes
            if self.start.publication is not None
            else 0
        )
        print(json.dumps({**facts, "served": served, "answer": self.model.answer()}), flush=True)

    def _dry_run(self) -> dict[str, torch.Tensor]:
        self.model.read(-1)
        self.model.process()
        return runtime_tensors(self.model)

    def _read_and_process(self) -> None:
        self.model.read(self.seed)
        self.model.process()


def main(instance: str, stage: str, device: str, protocol: str, seed: str, *size: str) -> None:
    with engine_log(), torch.no_grad():
        engine = Engine(instance, stage, device, protocol, int(seed), [int(one) for one in size])
        engine.run()
        engine.report()
        for line in sys.stdin:
            engine.update(int(line))
            engine.report()
        engine.start.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
