"""A llama-architecture decoder in PyTorch with LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer.

Invariants: the base weights are the dequantized blocks of the GGUF file and never change unless `full` is asked for;
with B = 0 the output is the base model's. Attention follows a tree: every row reads its prefix and itself, so one
prefix serves many continuations and is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.gguf_weights import GgufWeights

TARGETS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CHUNK = 192  # rows of attention at once: tokens that none of them reads are not computed
COLUMNS = 256  # and those that are read are a multiple of so many: a kernel is made for each shape

Piece = tuple[int, int, Tensor, Tensor]  # rows from, to; columns that they read (c,); bias (rows x a group's heads, c)


class LoraLinear(nn.Module):
    """`x W' + (alpha / rank) x A' B'` with W (out, in), A (rank, in), B (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, full: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=full)
        self.scale = alpha / rank if rank else 0.0
        if rank:
            self.a = nn.Parameter(torch.empty(rank, weight.shape[1]))
            self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
            nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight)
        return torch.addmm(out, F.linear(x, self.a) * self.scale, self.b.t()) if self.scale else out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, weights: GgufWeights, index: int, rank: int, alpha: float, full: bool) -> None:
        super().__init__()
        self.shape = weights.shape
        for name in TARGETS:
            weight = torch.from_numpy(weights.dense(f"blk.{index}.{name}.weight"))
            self.add_module(name, LoraLinear(weight, rank, alpha, full))
        for name in ("attn_norm", "ffn_norm"):
            value = torch.from_numpy(weights.vector(f"blk.{index}.{name}.weight"))
            self.register_parameter(name, nn.Parameter(value, requires_grad=full))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, pieces: Sequence[Piece]) -> Tensor:
        s, count = self.shape, len(x)
        kind = self.attn_q.weight.dtype
        normed = F.rms_norm(x, (s.width,), self.attn_norm, s.epsilon).to(kind)
        query = _rotate(self.attn_q(normed).view(count, s.heads, s.head_size) * s.head_size**-0.5, cos, sin).to(kind)
        key = _rotate(self.attn_k(normed).view(count, s.kv_heads, s.head_size), cos, sin).to(kind)
        value = self.attn_v(normed).view(count, s.kv_heads, s.head_size)
        attended = _attend(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), pieces)
        x = x + self.attn_output(attended.transpose(0, 1).reshape(count, s.width))
        normed = F.rms_norm(x, (s.width,), self.ffn_norm, s.epsilon).to(kind)
        return x + self.ffn_down(F.silu(self.ffn_gate(normed)) * self.ffn_up(normed))


class Decoder(nn.Module):
    """Tokens (n,), positions (n,), who reads whom (n, n) in; hidden states (n, width) out."""

    def __init__(self, weights: GgufWeights, rank: int, alpha: float, full: bool = False) -> None:
        super().__init__()
        s = self.shape = weights.shape
        self.embedding = nn.Parameter(torch.from_numpy(weights.dense("token_embd.weight")), requires_grad=False)
        self.norm = nn.Parameter(torch.from_numpy(weights.vector("output_norm.weight")), requires_grad=full)
        self.layers = nn.ModuleList(Layer(weights, i, rank, alpha, full) for i in range(s.layers))
        inverse = s.rope_base ** (-torch.arange(0, s.head_size, 2) / s.head_size)
        self.register_buffer("inverse", inverse.float(), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        angle = positions[:, None, None] * self.inverse
        x, cos, sin = self.embedding[tokens].float(), angle.cos(), angle.sin()
        pieces = list(_pieces(mask, self.embedding.dtype, self.shape.heads // self.shape.kv_heads))
        for layer in self.layers:
            x = layer(x, cos, sin, pieces)
        return F.rms_norm(x, (self.shape.width,), self.norm, self.shape.epsilon)

    def halve(self) -> None:
        """Keep what is not trained as bfloat16."""
        for value in self.parameters():
            if not value.requires_grad and value.dim() > 1:
                value.data = value.data.bfloat16()

    def trained(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}


def logits(hidden: Tensor, embedding: Tensor) -> Tensor:
    """(n, vocabulary) float32 of hidden states (n, width), multiplied in what the embedding is kept in."""
    return F.linear(hidden.to(embedding.dtype), embedding).float()


def load(gguf: Path, rank: int, alpha: float, full: bool = False) -> Decoder:
    """A decoder over the weights of a GGUF file."""
    return Decoder(GgufWeights(gguf), rank, alpha, full)


def _pieces(mask: Tensor, dtype: torch.dtype, heads: int) -> Iterator[Piece]:
    count = len(mask)
    for at in range(0, count, CHUNK):
        end = min(count, at + CHUNK)
        read = mask[at:end].any(0)
        more = min(-int(read.sum()) % COLUMNS, count - int(read.sum()))
        read[(~read).nonzero()[:more, 0]] = True
        columns = read.nonzero()[:, 0]
        yield at, end, columns, torch.where(mask[at:end, columns], 0.0, -1e30).to(dtype).repeat(heads, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """(heads, n, size) of query against (kv heads, n, size)."""
    heads, _, size = query.shape
    groups = len(key)
    parts = []
    for at, end, columns, bias in pieces:
        rows = query[:, at:end].reshape(groups, -1, size)
        scores = torch.baddbmm(bias, rows, key.index_select(1, columns).transpose(1, 2))
        weights = torch.softmax(scores, -1).to(value.dtype)
        parts.append(torch.bmm(weights, value.index_select(1, columns)).view(heads, end - at, size))
    return torch.cat(parts, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
