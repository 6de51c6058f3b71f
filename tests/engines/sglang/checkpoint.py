"""Small random models on disk, as Hugging Face lays them out, without a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY = 128, 3, 4, 2, 320
HEAD = HIDDEN // HEADS


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Spread so far that greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.12).to(torch.bfloat16)

    def norm() -> torch.Tensor:
        return (1 + 0.2 * torch.randn(HIDDEN, generator=generator)).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.input_layernorm.weight": norm(),
            f"{at}.post_attention_layernorm.weight": norm(),
            f"{at}.self_attn.q_proj.weight": matrix(HEADS * HEAD, HIDDEN),
            f"{at}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"{at}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, HIDDEN),
            f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD),
            f"{at}.mlp.gate_proj.weight": matrix(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.up_proj.weight": matrix(2 * HIDDEN, HIDDEN),
            f"{at}.mlp.down_proj.weight": matrix(HIDDEN, 2 * HIDDEN),
        }
    return tensors


def tied_weights(seed: int) -> dict[str, torch.Tensor]:
    """As Qwen2 has them: biases for the attention, and one matrix for embedding and head."""
    generator = torch.Generator().manual_seed(seed + 1)
    tensors = weights(seed)
    del tensors["lm_head.weight"]
    for layer in range(LAYERS):
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            bias = torch.randn(heads * HEAD, generator=generator) * 0.1
            at = f"model.layers.{layer}.self_attn.{name}_proj.bias"
            tensors[at] = bias.to(torch.bfloat16)
    return tensors


def write_tied_checkpoint(folder: Path, seed: int) -> Path:
    """As `write_checkpoint`, a Qwen2."""
    write_checkpoint(folder, seed)
    save_file(tied_weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_checkpoint(folder: Path, seed: int) -> Path:
    """The same seed writes the same weights."""
    folder.mkdir(parents=True)
    save_file(weights(seed), folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
