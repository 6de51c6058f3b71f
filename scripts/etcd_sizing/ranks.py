"""The ranks that are stored: a dense one and one of a mixture of experts, and their records."""

from __future__ import annotations

import random
from math import prod

from engine_registry import Manifest, ModelIdentity, Region, TensorEntry
from engine_registry.schema.record import ManifestRef, RankRecord

TP = 8
INSTANCE_RANKS = 1_000


def dense_rank() -> Manifest:
    """One of 8 ranks of a model of 70 billion parameters: 80 layers, bfloat16."""
    hidden, ffn, kv = 8192, 28672, 1024
    layer = {
        "self_attn.q_proj": ((hidden, hidden), 0),
        "self_attn.k_proj": ((kv, hidden), 0),
        "self_attn.v_proj": ((kv, hidden), 0),
        "self_attn.o_proj": ((hidden, hidden), 1),
        "mlp.gate_proj": ((ffn, hidden), 0),
        "mlp.up_proj": ((ffn, hidden), 0),
        "mlp.down_proj": ((hidden, ffn), 1),
        "input_layernorm": ((hidden,), None),
        "post_attention_layernorm": ((hidden,), None),
    }
    tensors: dict[str, tuple[tuple[int, ...], int | None]] = {
        "model.embed_tokens.weight": ((128256, hidden), 0),
        "model.norm.weight": ((hidden,), None),
        "lm_head.weight": ((128256, hidden), 0),
    }
    for number in range(80):
        tensors |= {f"model.layers.{number}.{name}.weight": cut for name, cut in layer.items()}
    return _laid_out(tensors)


def moe_rank() -> Manifest:
    """A rank that holds every expert of 62 layers as a quantised tensor each: some 60,000."""
    tensors: dict[str, tuple[tuple[int, ...], int | None]] = {}
    for layer in range(62):
        for expert in range(160):
            for name in ("gate_proj", "up_proj", "down_proj"):
                prefix = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                tensors |= {prefix: ((2048, 7168), 0), f"{prefix}_scale_inv": ((16, 56), 0)}
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = ((7168, 2048), 0)
    return _laid_out(tensors)


def _laid_out(tensors: dict[str, tuple[tuple[int, ...], int | None]]) -> Manifest:
    """In an order of chance, which compresses worst; aligned to 512 bytes, large ones to 2 MiB; in
    regions of a GiB at most.
    """
    addr = start = 0x7F3A_4000_0000
    entries, regions = [], []
    names = sorted(tensors)
    random.Random(0).shuffle(names)  # noqa: S311  the same every time
    for name in names:
        whole, dim = tensors[name]
        shape = tuple(size // TP if axis == dim else size for axis, size in enumerate(whole))
        offsets = tuple(3 * size if axis == dim else 0 for axis, size in enumerate(shape))
        nbytes = 2 * prod(shape)
        if addr + nbytes > start + (1 << 30):
            regions.append(Region(start, addr - start))
            start = addr
        entries.append(
            TensorEntry(name, "bfloat16", shape, addr, nbytes, whole, offsets, opaque=False)
        )
        align = 2 << 20 if nbytes > 1 << 20 else 512
        addr += -(-nbytes // align) * align
    regions.append(Region(start, addr - start))
    entries.sort(key=lambda entry: entry.name)
    return Manifest(tuple(entries), tuple(regions))


def a_record(rank: int, ranks: int, ref: ManifestRef) -> RankRecord:
    number, place = divmod(rank, INSTANCE_RANKS)
    node, gpu = divmod(rank, TP)
    return RankRecord(
        incarnation=f"{rank:032x}",
        generation="a1b2c3d4e5f64718",
        instance=f"llama-3-70b-prod-{number:03}",
        rank=place,
        world_size=min(INSTANCE_RANKS, ranks - number * INSTANCE_RANKS),
        topology={"tp": (gpu, TP), "pp": (0, 1), "dp": (node, 1 << 20)},
        model=ModelIdentity(
            "meta-llama/Llama-3.1-70B-Instruct",
            "1605565b47bb9346c5515c34102e054115b4f98b",
            "bfloat16",
            "none",
        ),
        session_id=f"10.{rank >> 16}.{rank >> 8 & 255}.{rank & 255}:15000",
        protocol="rdma",
        fabric="rail-3",
        device=f"cuda:{gpu}",
        manifest=ref,
        header_addr=0x7F3A_4000_0000,
        registered_at="2026-01-01T00:00:00.000+00:00",
        version=12,
        writer="0.1.0",
        host=f"gpu-node-{node:05}",
        pid=41_000 + gpu,
    )
