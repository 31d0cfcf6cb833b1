"""Tiny models in the styles of projects that do not use transformers; own code, random weights.

Each is called in its project's way; ``STYLES`` says how, so that one test serves them all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MAX_LEN = 96, 2, 4, 2, 16, 256
HIDDEN = HEADS * HEAD_DIM

Pair = tuple[Tensor, Tensor]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, h * D]`` to ``[B, h, T, D]``."""
    return x.view(x.shape[0], x.shape[1], heads, HEAD_DIM).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, T, D]`` to ``[B, T, H * D]``."""
    return x.transpose(1, 2).contiguous().view(x.shape[0], x.shape[2], HIDDEN)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions ``[T]`` for ``[B, h, T, D]``."""
    half = HEAD_DIM // 2
    speed = 100.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = positions[:, None] * speed
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def lower_right(q_len: int, kv_len: int) -> Tensor:
    """What the last ``q_len`` of ``kv_len`` tokens see, ``[Q, K]`` bool."""
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


class Decoder(nn.Module):
    """Embedding, blocks and head; what differs is in the attention and in who holds the cache."""

    def __init__(self, attention: Callable[[], nn.Module], learned: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.wpe = nn.Embedding(MAX_LEN, HIDDEN) if learned else None
        self.layers = nn.ModuleList(Block(attention()) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def embed(self, idx: Tensor, pos: Tensor) -> Tensor:
        return self.wte(idx) if self.wpe is None else self.wte(idx) + self.wpe(pos)


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn = attn
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))


# --- nanoGPT: tuples in, tuples out


class FusedAttention(nn.Module):
    """One projection for q, k and v; the cache goes in and out as a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.wo = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor, past: Pair | None) -> tuple[Tensor, Pair]:
        q, k, v = (split_heads(part, HEADS) for part in self.c_attn(x).split(HIDDEN, dim=2))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.wo(self.attend(q, k, v)), (k, v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        if q_len == kv_len:
            return merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        mask = None if q_len == 1 else lower_right(q_len, kv_len)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class NanoGPT(Decoder):
    """``model(idx, pos, past_kvs) -> logits, past_kvs``; without ``pos`` it counts the cache."""

    def __init__(self, attention: Callable[[], nn.Module] = FusedAttention) -> None:
        super().__init__(attention)

    def forward(
        self, idx: Tensor, pos: Tensor | None = None, past_kvs: list[Pair] | None = None
    ) -> tuple[Tensor, list[Pair]]:
        if pos is None:
            held = 0 if past_kvs is None else past_kvs[0][0].shape[2]
            pos = torch.arange(held, held + idx.shape[1])
        x, new = self.embed(idx, pos), []
        for i, block in enumerate(self.layers):
            past = None if past_kvs is None else past_kvs[i]
            out, pair = block.attn(block.ln_1(x), past)
            x = x + out
            x = x + block.mlp(block.ln_2(x))
            new.append(pair)
        return self.head(self.norm(x)), new


class EinsumAttention(FusedAttention):
    """The products written out, softmax between them, heads apart in the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.wo = nn.Parameter(torch.randn(HEADS, HEAD_DIM, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor, past: Pair | None) -> tuple[Tensor, Pair]:
        q, k, v = self.c_attn(x).split(HIDDEN, dim=2)
        q, (k, v) = q.unflatten(2, (HEADS, HEAD_DIM)), (split_heads(part, HEADS) for part in (k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        scores = torch.einsum("bqhd,bhkd->bhqk", q, k) / math.sqrt(HEAD_DIM)
        last = torch.arange(q.shape[1])[:, None] + (k.shape[2] - q.shape[1])
        seen = torch.arange(k.shape[2]) <= last
        weights = (scores + torch.where(seen, 0.0, -torch.inf)).softmax(dim=-1)
        out = torch.einsum("bhqk,bhkd->bqhd", weights, v)
        return torch.einsum("bqhd,hde->bqe", out, self.wo), (k, v)


class FlexAttention(FusedAttention):
    """``flex_attention`` with a causal block mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        if q_len == 1:
            return merge_heads(flex_attention(q, k, v))
        mask = create_block_mask(
            lambda b, h, qi, ki: qi + (kv_len - q_len) >= ki, None, None, q_len, kv_len, q.device
        )
        return merge_heads(flex_attention(q, k, v, block_mask=mask))


# --- caches in module attributes


class GroupedAttention(nn.Module):
    """Separate projections, grouped queries, rotary positions; the cache is a module."""

    def __init__(self, cache: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.wk = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.kv_cache = cache()

    def forward(self, x: Tensor, input_pos: Tensor) -> Tensor:
        q = rotated(split_heads(self.wq(x), HEADS), input_pos)
        k = rotated(split_heads(self.wk(x), KV_HEADS), input_pos)
        v = split_heads(self.wv(x), KV_HEADS)
        k, v = self.kv_cache.update(input_pos, k, v)
        q_len, kv_len = q.shape[2], k.shape[2]
        mask = self.kv_cache.mask(input_pos, kv_len)
        groups = HEADS // KV_HEADS
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        if mask is None and q_len > 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(merge_heads(out))


class AttributeModel(Decoder):
    """``model(idx, input_pos) -> logits``; each layer keeps its own cache."""

    def __init__(self, cache: Callable[[], nn.Module]) -> None:
        super().__init__(lambda: GroupedAttention(cache), learned=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embed(idx, input_pos)
        for block in self.layers:
            x = x + block.attn(block.ln_1(x), input_pos)
            x = x + block.mlp(block.ln_2(x))
        return self.head(self.norm(x))


class GrowingCache(nn.Module):
    """Assigned anew at each call: what it is assigned may be shorter."""

    def __init__(self) -> None:
        super().__init__()
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> Pair:
        if self.k is None or self.v is None:
            self.k, self.v = k, v
        else:
            self.k, self.v = torch.cat([self.k, k], dim=2), torch.cat([self.v, v], dim=2)
        return self.k, self.v

    def mask(self, input_pos: Tensor, kv_len: int) -> Tensor | None:
        q_len = input_pos.shape[0]
        return None if q_len in (1, kv_len) else lower_right(q_len, kv_len)


class EmptyBufferCache(GrowingCache):
    """The same from a registered buffer that starts out empty."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        empty = torch.empty(1, KV_HEADS, 0, HEAD_DIM)
        self.register_buffer("k", empty, persistent=False)
        self.register_buffer("v", empty.clone(), persistent=False)


class StaticCache(nn.Module):
    """Buffers of full length, written in place at the tokens' positions."""

    def __init__(self) -> None:
        super().__init__()
        shape = (1, KV_HEADS, MAX_LEN, HEAD_DIM)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("causal", lower_right(MAX_LEN, MAX_LEN), persistent=False)

    def mask(self, input_pos: Tensor, kv_len: int) -> Tensor:
        return self.causal[None, None, input_pos, :kv_len]


class IndexPutCache(StaticCache):
    """gpt-fast."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> Pair:
        self.k_cache[:, :, input_pos] = k
        self.v_cache[:, :, input_pos] = v
        return self.k_cache, self.v_cache


class IndexCopyCache(StaticCache):
    """LitGPT."""

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> Pair:
        return self.k_cache.index_copy_(2, input_pos, k), self.v_cache.index_copy_(2, input_pos, v)


class CountingCache(StaticCache):
    """torchtune: the cache counts by itself where the next tokens go."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_pos", torch.arange(MAX_LEN), persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> Pair:
        at = self.cache_pos[: k.shape[2]]
        self.k_cache[:, :, at] = k
        self.v_cache[:, :, at] = v
        self.cache_pos.add_(k.shape[2])
        return self.k_cache, self.v_cache


# --- torch.nn


class TorchDecoder(nn.Module):
    """``nn.TransformerDecoder``: no cache, the whole text at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(MAX_LEN, HIDDEN)
        layer = nn.TransformerDecoderLayer(HIDDEN, HEADS, HIDDEN, 0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, idx: Tensor, memory: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1])
        return self.head(self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True))


# --- how each is called


@dataclasses.dataclass(frozen=True)
class Style:
    """How a kind of model is made, called and looked into.

    ``call(model, idx, pos, cache)`` gives logits and cache; ``pairs(model, cache)`` each layer's K
    and V; ``put(model, pairs)`` a cache that holds them; ``weight(block)`` is ``[E, H * D]``.
    """

    make: Callable[[], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, Any], tuple[Tensor, Any]]
    pairs: Callable[[nn.Module, Any], list[Pair]]
    put: Callable[[nn.Module, list[Pair]], Any]
    weight: Callable[[nn.Module], Tensor] = lambda block: block.attn.wo.weight


def _tuples(make: Callable[[], nn.Module], **options: Any) -> Style:
    def call(model: nn.Module, idx: Tensor, pos: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return model(idx, pos, cache)

    return Style(make, call, lambda model, cache: cache, lambda model, pairs: pairs, **options)


def _attributes(cache: Callable[[], nn.Module]) -> Style:
    def call(model: nn.Module, idx: Tensor, pos: Tensor, _: Any) -> tuple[Tensor, Any]:
        return model(idx, input_pos=pos), None

    def pairs(model: nn.Module, _: Any) -> list[Pair]:
        return [(block.attn.kv_cache.k, block.attn.kv_cache.v) for block in model.layers]

    def put(model: nn.Module, pairs: list[Pair]) -> None:
        for block, (k, v) in zip(model.layers, pairs, strict=True):
            block.attn.kv_cache.k, block.attn.kv_cache.v = k, v

    return Style(lambda: AttributeModel(cache), call, pairs, put)


STYLES: dict[str, Style] = {
    "nanogpt": _tuples(NanoGPT),
    "einsum": _tuples(
        lambda: NanoGPT(EinsumAttention), weight=lambda block: block.attn.wo.flatten(0, 1).T
    ),
    "flex": _tuples(lambda: NanoGPT(FlexAttention)),
    "growing attribute": _attributes(GrowingCache),
    "empty buffer": _attributes(EmptyBufferCache),
}
STATIC = {"gpt-fast": IndexPutCache, "litgpt": IndexCopyCache, "torchtune": CountingCache}


# Options of nn.Module.compile. It compiles an entrance that all models share: without isolation a
# process that has compiled eight others runs the ninth uncompiled.
BARE: dict[str, Any] = {
    "isolate_recompiles": True,
    "options": {"budget": 0.5, "lowering": "eager"},
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, the same at every call, its attention sharp enough to choose by."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("c_attn.weight", "wq", "wk")):
                parameter.mul_(4.0)
    return model
