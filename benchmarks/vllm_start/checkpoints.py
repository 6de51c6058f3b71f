"""Small random checkpoints with tokenizers, as real engines read them. Runs in the engines' own
environment.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_FILE = "model.safetensors"
_ENDS = ("<s>", "</s>")  # of a text


def make(
    kind: str,
    folder: str,
    *,
    seed: int = 0,
    hidden: int = 128,
    layers: int = 4,
    vocab: int = 320,
    kv_heads: int = 2,
) -> None:
    """A checkpoint of the kind in the folder; the same bytes for the same arguments."""
    import transformers

    torch.manual_seed(seed)
    heads = max(4, hidden // 64)
    base: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": max(32, hidden // heads),
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {}),
        "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
        "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
        "qwen3moe": (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden},
        ),
    }
    family, more = families[kind]
    config = getattr(transformers, f"{family}Config")(**base, **more)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    with torch.no_grad():  # a spread at which greedy tokens differ from place to place
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.12)
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder, safe_serialization=True)
    _make_tokenizer(folder)


def quantize(source: str, folder: str) -> None:
    """The same checkpoint with int8 weights, a scale for each channel (compressed-tensors)."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(_FILE))
    tensors = {}
    for name, tensor in load_file(Path(source, _FILE)).items():
        if tensor.dim() == 2 and "proj" in name:
            scale = tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / 127
            tensors[name] = (tensor.float() / scale).round().clamp(-127, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, Path(folder, _FILE), {"format": "pt"})
    path = Path(folder, "config.json")
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"] = _int8()
    path.write_text(json.dumps(config, indent=1), "utf-8")


def adapt(source: str, folder: str, *, rank: int = 4) -> None:
    """A random adapter (LoRA) for the queries of the checkpoint."""
    config = json.loads(Path(source, "config.json").read_text("utf-8"))
    hidden, out = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    torch.manual_seed(5)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(rank, hidden)
        tensors[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, rank)
    Path(folder).mkdir()
    save_file(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})
    adapter = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": source,
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    Path(folder, "adapter_config.json").write_text(json.dumps(adapter), "utf-8")


def _int8() -> dict[str, Any]:
    common = {
        "num_bits": 8,
        "symmetric": True,
        "type": "int",
        "group_size": None,
        "block_structure": None,
        "observer_kwargs": {},
        "actorder": None,
    }
    return {
        "config_groups": {
            "group_0": {
                "input_activations": {
                    **common,
                    "dynamic": True,
                    "strategy": "token",
                    "observer": None,
                },
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    **common,
                    "dynamic": False,
                    "strategy": "channel",
                    "observer": "minmax",
                },
            }
        },
        "format": "int-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _make_tokenizer(folder: str) -> None:
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: at for at, text in enumerate([*alphabet, *_ENDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = dict(zip(("bos_token", "eos_token"), _ENDS, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
