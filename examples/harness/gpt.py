"""A small modern GPT: rotary positions, RMSNorm, SwiGLU, tied embeddings, no biases.

Shapes: B sequences, T tokens, D model width, H heads, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; `dim` is split evenly over `heads`, each of an even width."""

    vocab: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128

    def __post_init__(self) -> None:
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"GPTConfig: dim must be a multiple of 2 * heads = {2 * self.heads} (rotary positions turn pairs), "
                f"got {self.dim}; use {-(-self.dim // (2 * self.heads)) * 2 * self.heads}"
            )

    @property
    def hidden(self) -> int:
        """F: 8/3 of `dim`, so that SwiGLU's three matrices cost what two of 4 * dim would; a multiple of 32."""
        return -(-8 * self.dim // (3 * 32)) * 32


def rotary_tables(context: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, (context, width) fp32 each; the two halves of a row repeat."""
    frequency = 10_000.0 ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(context, dtype=torch.float32), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + width/2}) by its position's angle. x (B, H, T, width); cos, sin (T, width)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D / H) each
        # DeepSpeed's bf16 casts parameters and leaves buffers: the turn is then taken in fp32 and rounded once.
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: out(silu(gate) * up). (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm transformer layer. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.attention = Attention(config)
        self.feed_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.feed = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed(self.feed_norm(x))


class GPT(nn.Module):
    """The language model; every parameter may be fp32 or bf16."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        # A parameter of the model itself, not of an nn.Embedding: both uses then lie in one module's forward,
        # which is the unit that ZeRO-3 gathers.
        self.embedding = nn.Parameter(torch.empty(config.vocab, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        cos, sin = rotary_tables(config.context, config.dim // config.heads)
        # Built in fp32, so that a later cast of the model rounds cosines, never positions.
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; those that write to the residual stream share it among 2 * layers."""
        nn.init.normal_(self.embedding, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes = 2 * self.config.layers if name.endswith(".out") else 1
                nn.init.normal_(module.weight, std=(module.in_features * writes) ** -0.5)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """tokens, targets (B, T) int64 -> mean cross-entropy in nats, () fp32; without targets logits (B, T, V)."""
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"GPT: at most context = {self.config.context} tokens, got {length}; shorten the windows")
        cos, sin = self.cos[:length], self.sin[:length]
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embedding)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
