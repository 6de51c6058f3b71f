"""Deltas of tensors on a GPU: the same bytes as elsewhere, and applied there too."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from unittest import mock

import pytest
import torch

from engine_loader.deltas import apply as applying
from engine_loader.deltas import apply_on_gpu, encode_on_gpu
from engine_loader.deltas import encode as encoding
from engine_loader.deltas.apply import apply, apply_all
from engine_loader.deltas.blocks import as_integers
from engine_loader.deltas.encode import encode
from engine_loader.deltas.format import BLOCK_NBYTES, capacity_of
from engine_loader.deltas.stated import Change
from engine_loader.errors import DeltaDamaged
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
    known = {entry.name: entry for entry in entries}
    changes = []
    for name, section in sections_of(data, entries).items():
        (dst,) = describe({name: ours[name]}).tensors
        if not whole:
            dst = replace(dst, global_shape=known[name].shape, offsets=(0, 9), opaque=False)
        changes.append(Change(section, known[name], ours[name], dst))
    apply_all(as_tensor(data).cuda(), changes)
    for name, one in after.items():
        wanted = (one if whole else one[:, 9:30]).contiguous()
        assert torch.equal(as_integers(ours[name].cpu()), as_integers(wanted))
    for each in changes:  # by torch, from the host's memory
        again = before[each.src.name]
        again = (again if whole else again[:, 9:30]).contiguous().cuda()
        section = each.section
        apply(bytes_of(data, section), section, each.src, again, each.dst)
        assert torch.equal(as_integers(again), as_integers(ours[each.src.name]))


def as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def various() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """In the host's memory: blocks of all kinds, of elements of all sizes, and changes that are far
    apart or at the ends.
    """
    torch.manual_seed(1)
    block = BLOCK_NBYTES
    before = {
        "bytes": torch.randint(0, 256, (2 * block + 12_345,), dtype=torch.uint8),
        "far": torch.zeros(block + 7, dtype=torch.int16),
        "kinds": torch.randint(0, 99, (5 * block // 8 + 3,), dtype=torch.int32),
        "longs": torch.zeros(70_001, dtype=torch.int64),
        "odd": torch.zeros(100_003, dtype=torch.uint8)[3:],
        "pairs": torch.zeros(4097, dtype=torch.complex128),
        "same": torch.zeros(1000),
        "none": torch.empty(0),
    } | {f"short{count}": torch.zeros(count, dtype=torch.bfloat16) for count in range(1, 10)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name, share in (("bytes", 0.02), ("longs", 0.3), ("odd", 0.01), ("pairs", 0.5)):
        flat = as_integers(after[name])
        flat[torch.rand(flat.shape) < share] += 1
    after["far"][[0, 255, 511, 4096, 70_000, block // 2 - 1, block // 2, block + 6]] = 1
    kinds = after["kinds"]  # the first block is the same
    kinds[block // 4 : block // 2][torch.rand(block // 4) < 0.02] += 1
    kinds[block // 2 :] += 1
    for count in range(1, 10):
        after[f"short{count}"][-1] = 1
    return before, after


@pytest.mark.parametrize("at_once", [1 << 27, 1 << 20], ids=["at once", "block by block"])
def test_kernels_write_and_bring_what_the_host_does(at_once: int) -> None:
    """On the last GPU, which need not be the current one."""
    before, after = various()
    entries = describe(after).tensors
    wanted = delta(entries, before, after)
    gpu = torch.device("cuda", torch.cuda.device_count() - 1)
    old, new = ({name: one.to(gpu) for name, one in side.items()} for side in (before, after))
    storage = torch.zeros(100_003, dtype=torch.uint8, device=gpu)
    for side, tensors in ((old, before), (new, after)):  # at an odd address
        side["odd"] = storage.clone()[3:].copy_(tensors["odd"])
    buffer = torch.zeros(capacity_of(entries), dtype=torch.uint8, device=gpu)
    with ExitStack() as stack:
        for module, name, value in (
            (encoding, "block_of", None),
            (applying, "apply", None),
            (encode_on_gpu, "_AT_ONCE", at_once),
            (apply_on_gpu, "_AT_ONCE_NBYTES", at_once),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        encoded = encode(entries, old, new, buffer, BEFORE, AFTER)
        assert encoded is not None
        assert bytes(buffer[: encoded.nbytes].cpu().numpy()) == wanted
        ours = {entry.name: entry for entry in describe(old).tensors}
        known = {entry.name: entry for entry in entries}
        changes = [
            Change(section, known[name], old[name], ours[name])
            for name, section in sections_of(wanted, entries).items()
        ]
        damaged = buffer.clone()
        damaged[changes[-1].section.offset + 20] ^= 1
        with pytest.raises(DeltaDamaged):
            apply_all(damaged, changes)
        for name, one in before.items():
            assert torch.equal(old[name].cpu(), one)
        apply_all(buffer, changes)
    for name, one in after.items():
        assert torch.equal(old[name].cpu(), one)
