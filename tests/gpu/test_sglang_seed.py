"""A seed of SGLang's own transfer on a GPU: its header is registered memory too."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from engine_loader.integrations.sglang.seed_engine import SeedEngine
from engine_loader.integrations.sglang.seeds import apart_from
from engine_loader.options import PublishOptions
from engine_loader.publishing.offering import offer_weights
from engine_loader.tensors.destination import Destination
from engine_registry import Region

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class Library:
    """Remembers what is registered."""

    def __init__(self) -> None:
        self.registered: list[Region] = []

    def register_memory(self, addr: int, nbytes: int) -> int:
        self.registered.append(Region(addr, nbytes))
        return 0

    def unregister_memory(self, addr: int) -> int:
        self.registered = [region for region in self.registered if region.addr != addr]
        return 0


def test_the_header_is_registered_and_no_parameter_is_registered_twice() -> None:
    # as small as a header, so that torch would put it into their segment
    tensors = {f"norm{number}": torch.ones(64, device="cuda") for number in range(50)}
    weights = [Region(tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values()]
    library = Library()
    engine = SeedEngine(library, "10.0.0.7:15001", "rdma", weights)
    with ExitStack() as undo:
        with apart_from(tensors)():
            offering = offer_weights(
                engine,
                Destination.of(tensors, None),
                undo,
                owner="sglang/0",
                options=PublishOptions(),
                version=0,
            )
        header = offering.header.region
        assert any(one.addr <= header.addr and header.end <= one.end for one in library.registered)
        assert not any(
            one.addr < weight.end and weight.addr < one.end
            for one in library.registered
            for weight in weights
        )
        assert sum(region.nbytes for region in offering.manifest.regions) == 50 * 64 * 4
        assert offering.header.read() is not None
    assert library.registered == []
