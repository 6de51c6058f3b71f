"""Digests: the same for the same bytes wherever they lie, different for any others, and kept in a
table by name.
"""

from __future__ import annotations

import functools

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engine_loader.digests import parts, table
from engine_loader.digests.parts import Part, digests_of_parts
from engine_loader.digests.table import ALGORITHMS, DigestCell, algorithm_for, digests_of

CPU = torch.device("cpu")
BLOCK_NBYTES = 256


@pytest.fixture(params=ALGORITHMS)
def algorithm(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little data takes several."""
    monkeypatch.setattr(table, "_BLOCK_WORDS", 64)
    monkeypatch.setattr(table, "BLOCK_NBYTES", dict.fromkeys(ALGORITHMS, BLOCK_NBYTES))
    monkeypatch.setattr(table, "_factors", functools.cache(table._factors.__wrapped__))


def digest(tensor: torch.Tensor, algorithm: str) -> bytes:
    return digests_of({"w": tensor}, algorithm)["w"]


def test_the_hosts_memory_and_an_accelerators_have_each_their_algorithm() -> None:
    assert algorithm_for(CPU) == "xxh3_128"
    assert algorithm_for(torch.device("cuda", 1)) == "multilinear_64"


def test_xxh3_is_that_of_the_bytes() -> None:
    assert (
        digest(torch.arange(10, dtype=torch.uint8), "xxh3_128")
        == xxhash.xxh3_128(bytes(range(10))).digest()
    )


def test_the_factors_are_splitmix64_from_zero() -> None:
    """As published with the algorithm: its first numbers for the seed 0."""
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [number % (1 << 64) for number in table._factors(CPU)[:3].tolist()] == wanted


@given(st.binary(min_size=1, max_size=1200), st.data())
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_flipped_bit_or_bytes_exchanged_change_the_digest(
    name: str, content: bytes, data: st.DataObject
) -> None:
    before = digest(torch.frombuffer(bytearray(content), dtype=torch.uint8), name)
    at, other = (data.draw(st.integers(0, len(content) - 1)) for _ in range(2))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    assert digest(torch.frombuffer(flipped, dtype=torch.uint8), name) != before
    exchanged = bytearray(content)
    exchanged[at], exchanged[other] = content[other], content[at]
    assert (digest(torch.frombuffer(exchanged, dtype=torch.uint8), name) == before) == (
        exchanged == content
    )


def test_length_counts_even_where_only_zeros_follow(algorithm: str) -> None:
    assert len({digest(torch.zeros(n, dtype=torch.uint8), algorithm) for n in range(600)}) == 600


@pytest.mark.parametrize(
    "tensor",
    [
        torch.rand(17, 3),
        torch.rand(5).to(torch.bfloat16),
        torch.rand(5).to(torch.float8_e4m3fn),
        torch.tensor(2.5, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.rand(3, dtype=torch.complex64),
        torch.rand(3, requires_grad=True),
        torch.empty(0, 7),
        torch.arange(1000, dtype=torch.uint8)[3:],  # begins at an odd address
        torch.rand(7, 9)[:, 2:5],  # in several runs
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_any_tensor_has_the_digest_of_its_bytes(algorithm: str, tensor: torch.Tensor) -> None:
    flat = tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)
    assert digest(tensor, algorithm) == digest(flat, algorithm)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_single_column_has_the_digest_of_its_bytes_in_a_row(
    algorithm: str, dtype: torch.dtype
) -> None:
    column = torch.arange(40).to(dtype).view(10, 4)[:, 1:2]
    assert digest(column, algorithm) == digest(column.clone(), algorithm)


def test_a_table_is_read_as_it_was_written_whatever_the_order_of_the_names(algorithm: str) -> None:
    tensors = {name: torch.rand(100) for name in ("b", "a", "c")}
    source, reader = (
        DigestCell(tensors, CPU, algorithm),
        DigestCell(reversed(list(tensors)), CPU, algorithm),
    )
    source.write(tensors)
    reader._bytes.copy_(source._bytes)
    assert reader.read() == digests_of(tensors, algorithm)
    tensors["a"][7] += 1
    assert {
        name for name, ours in digests_of(tensors, algorithm).items() if ours != reader.read()[name]
    } == {"a"}


def test_a_table_of_no_tensors_is_memory_all_the_same(algorithm: str) -> None:
    cell = DigestCell([], CPU, algorithm)
    cell.write({})
    assert cell.region.nbytes > 0
    assert cell.read() == {}


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 257, 512, 1000, 70_000])
def test_the_digest_of_a_block_is_that_of_its_bytes(algorithm: str, nbytes: int) -> None:
    some = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
    blocks = some.split(BLOCK_NBYTES) if nbytes > BLOCK_NBYTES else []
    both = [digest(some, algorithm), *(digest(block, algorithm) for block in blocks)]
    assert digests_of({"w": some}, algorithm, blocks=True)["w"] == b"".join(both)


def test_a_table_with_blocks_has_them_where_the_manifest_says(algorithm: str) -> None:
    tensors = {"b": torch.rand(100), "short": torch.rand(3), "a": torch.rand(200)}
    cell = DigestCell.with_blocks(tensors, CPU, algorithm)
    assert cell.write(tensors) == cell.read() == digests_of(tensors, algorithm)
    packed = cell.packed()
    assert len(packed) == cell.region.nbytes
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for name, slots in cell.table.slots(sizes).items():
        found = [packed[16 * slot : 16 * (slot + 1)] for slot in slots]
        blocks = tensors[name].view(torch.uint8).split(BLOCK_NBYTES)
        assert found == [digest(block, algorithm) for block in blocks]


def test_parts_of_memory_have_the_digests_of_their_bytes_in_order(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_AT_ONCE_NBYTES", "_ON_DEVICE_NBYTES"):
        monkeypatch.setattr(parts, name, 300)
    one, other = (torch.randint(0, 256, (1000,), dtype=torch.uint8) for _ in range(2))
    some = [Part(one, 0, 250), Part(other, 7, 500), Part(one, 250, 1), Part(other, 0, 1000)]
    wanted = [digest(part.flat[part.start :][: part.nbytes], algorithm) for part in some]
    assert list(digests_of_parts(some, algorithm)) == wanted
    assert list(digests_of_parts([], algorithm)) == []
