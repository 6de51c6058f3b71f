"""Every tensor that is not plain memory is refused by its name, with what to do, and never by an
error of torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.distributed._functional_collectives import all_gather_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from engine_loader import Destination
from engine_loader.errors import TensorsUnusable
from engine_loader.tensors.regions import describe, moved
from engine_loader.tensors.shards import local_parts
from engine_loader.tensors.state_dict import whole

INSIDE = "give the plain tensors that it is made of"


class Wrapper(torch.Tensor):
    """Answers nothing that torch asks of it, not even its sizes where `policy` says so."""

    @staticmethod
    def __new__(cls, policy: str | None = None) -> Wrapper:
        options: Any = {} if policy is None else {"dispatch_sizes_strides_policy": policy}
        wrapper: Wrapper = torch.Tensor._make_wrapper_subclass(
            cls, (3,), dtype=torch.float32, **options
        )
        return wrapper

    def __init__(self, policy: str | None = None) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise LookupError(f"no {func}\nhere")


class Named(torch.Tensor):
    pass


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def functional() -> torch.Tensor:
    with FunctionalTensorMode():
        tensor: torch.Tensor = FunctionalTensor.to_functional(torch.zeros(3))
    return tensor


def freed() -> torch.Tensor:
    """As sharded data parallelism leaves the parameters that it has given away."""
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def shorter() -> torch.Tensor:
    tensor = torch.zeros(8)
    tensor.untyped_storage().resize_(16)
    return tensor


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)


UNUSABLE: dict[str, tuple[Callable[[], object], str]] = {
    "not contiguous": (
        lambda: torch.zeros(3, 4)[:, 1:3],
        r"is not contiguous \(shape \[3, 2\], strides \[4, 1\]\)",
    ),
    "every other": (lambda: torch.zeros(8)[::2], "is not contiguous"),
    "expanded": (lambda: torch.zeros(1).expand(3), "is not contiguous"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "has layout torch.sparse_coo"),
    "compressed": (
        lambda: torch.eye(3).to_sparse_csr(),
        r"has layout torch.sparse_csr: .*: call \.to_dense\(\)",
    ),
    "opaque": (lambda: torch.zeros(3).to_mkldnn(), "has layout torch._mkldnn"),
    "meta": (lambda: torch.empty(3, device="meta"), "is on the meta device and has no memory"),
    "a subclass on meta": (
        lambda: torch.empty(3, device="meta").as_subclass(Named),
        "is on the meta device and has no memory",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "is a quantized tensor",
    ),
    "conjugated": (
        lambda: torch.zeros(3, dtype=torch.complex64).conj(),
        ("is a lazily conjugated or negated view"),
    ),
    "negated": (lambda: torch._neg_view(torch.zeros(3)), "is a lazily conjugated or negated view"),
    "an array": (lambda: [1.0, 2.0], "is a list, not a tensor"),
    "nothing": (lambda: None, "is a NoneType, not a tensor"),
    "freed": (freed, "has no memory: its storage was freed"),
    "fake": (fake, "is a FakeTensor without its own memory: make it outside of FakeTensorMode"),
    "a fake parameter": (
        lambda: torch.nn.Parameter(fake()),
        ("is a FakeTensor without its own memory"),
    ),
    "functional": (functional, "is a FunctionalTensor without its own memory"),
    "zeros that are never written": (
        lambda: torch._efficientzerotensor((3,)),
        "is a Tensor without its own memory: give one from outside of what torch traces",
    ),
    "shorter": (shorter, "reaches to byte 32 of a storage that has 16: it was resized"),
    "two in one": (
        lambda: TwoTensor(torch.zeros(3), torch.zeros(3)),
        rf"is a TwoTensor without its own memory: {INSIDE}, .* \(a, b\)",
    ),
    "a wrapper": (Wrapper, "is a Wrapper without its own memory"),
    "a wrapper without strides": (lambda: Wrapper("strides"), "is a Wrapper"),
    "a wrapper without sizes": (
        lambda: Wrapper("sizes"),
        r"is a Wrapper that torch cannot look at \(no .* here\)",
    ),
    "a lazy parameter": (
        torch.nn.UninitializedParameter,
        r"is not initialized and has no shape yet",
    ),
    "a lazy buffer": (torch.nn.UninitializedBuffer, r"is not initialized and has no shape yet"),
    "nested": (
        lambda: nested(torch.strided),
        r"is a nested tensor, .* give the tensors of \.unbind\(\)",
    ),
    "jagged": (lambda: nested(torch.jagged), "is a nested tensor"),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates some, and calls others a prototype
@pytest.mark.parametrize(("make", "said"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_no_plain_memory_is_refused_with_what_to_do(
    make: Callable[[], Any], said: str
) -> None:
    with pytest.raises(
        TensorsUnusable, match=f"^1 tensor cannot be used as is: w: {said}"
    ) as caught:
        Destination({"w": make()})
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [make for make, _ in UNUSABLE.values()], ids=UNUSABLE)
def test_nothing_is_stated_of_the_shape_of_what_is_refused(make: Callable[[], Any]) -> None:
    stated = whole({"good": torch.zeros(2), "w": make()})
    assert list(stated) == ["good"]


TRANSFORMS: dict[
    str, Callable[[Callable[[torch.Tensor], torch.Tensor]], Callable[[torch.Tensor], object]]
] = {
    "vmap": torch.func.vmap,
    "grad": torch.func.grad,
    "functionalize": torch.func.functionalize,
    "vmap of grad": lambda work: torch.func.vmap(torch.func.grad(work)),
    "fake trace": lambda work: make_fx(work, tracing_mode="fake"),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_tensor_that_a_transformed_function_gets_is_refused(transform: Any) -> None:
    refused = []

    def work(tensor: torch.Tensor) -> torch.Tensor:
        with pytest.raises(
            TensorsUnusable,
            match=r"^1 tensor cannot be used as is: w: (belongs to|is a FakeTensor)",
        ) as caught:
            Destination({"w": tensor})
        refused.append(caught)
        return tensor.sum()

    transform(work)(
        torch.ones(3, 2)[0] if transform is not TRANSFORMS["vmap of grad"] else torch.ones(3, 2)
    )
    assert len(refused) == 1


def test_a_subclass_with_memory_is_a_tensor_like_others() -> None:
    tensor = torch.zeros(3).as_subclass(Named)
    assert describe({"w": tensor}).tensors[0].addr == tensor.data_ptr()


def test_a_lazily_copied_tensor_gets_its_memory_before_it_is_described() -> None:
    base = torch.ones(4)
    copied = torch._lazy_clone(base)
    (entry,) = Destination({"w": copied}).manifest.tensors
    assert entry.addr == copied.data_ptr() != base.data_ptr()


# -- results of collectives ----------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch is about to rename the collective
@pytest.mark.parametrize("in_dtensor", [False, True], ids=["alone", "in a DTensor"])
def test_what_a_collective_still_fills_is_waited_for_and_used(
    mesh: DeviceMesh, in_dtensor: bool
) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    result: Any = all_gather_tensor(values, 0, mesh)
    assert type(result).__name__ == "AsyncCollectiveTensor"
    tensor = DTensor.from_local(result, mesh, [Split(0)]) if in_dtensor else result
    parts, boxes = local_parts({"w": tensor})
    assert torch.equal(parts["w"], values)
    (entry,) = describe(parts, boxes).tensors
    assert (entry.addr, entry.shape) == (result.elem.data_ptr(), (2, 3))
    assert entry.opaque is not in_dtensor
    assert moved({"w": tensor}, describe(parts, boxes)) == []
