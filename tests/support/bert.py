"""A BERT encoder of the usual module names, so that real checkpoints of it load: what `load_module`
is tried on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Config:
    """By default that of all-MiniLM-L6-v2."""

    vocabulary: int = 30522
    positions: int = 512
    hidden: int = 384
    heads: int = 12
    inner: int = 1536
    layers: int = 6


class Embeddings(nn.Module):
    position_ids: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.hidden)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden)
        self.token_type_embeddings = nn.Embedding(2, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(config.positions), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = self.position_embeddings(self.position_ids[: ids.shape[-1]])
        normed: torch.Tensor = self.LayerNorm(
            self.word_embeddings(ids) + places + self.token_type_embeddings.weight[0]
        )
        return normed


class SelfAttention(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(config.hidden, config.hidden) for _ in range(3)
        )
        self.heads = config.heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            each(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for each in (self.query, self.key, self.value)
        )
        return (
            functional.scaled_dot_product_attention(query, key, value).transpose(-3, -2).flatten(-2)
        )


class Output(nn.Module):
    def __init__(self, inner: int, config: Config) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=1e-12)

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.LayerNorm(self.dense(x) + before)
        return normed


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": Output(config.hidden, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.inner)})
        self.output = Output(config.inner, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x), x)
        inner = functional.gelu(self.intermediate["dense"](x))
        after: torch.Tensor = self.output(inner, x)
        return after


class Bert(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(config) for _ in range(config.layers))}
        )
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.hidden)})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(ids)
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            x = layer(x)
        return torch.tanh(self.pooler["dense"](x[..., 0, :]))


class MaskedLanguageModel(nn.Module):
    """Its decoder is tied to the embeddings."""

    steps: torch.Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.decoder = nn.Linear(config.hidden, config.vocabulary)
        self.decoder.weight = self.bert.embeddings.word_embeddings.weight
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.decoder(self.bert(ids))
        return scores
