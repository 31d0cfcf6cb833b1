"""Heads of different lengths that are cut again and again, by hand: an uncompiled model that keeps
all K and V and does not see what is not kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from eager import weight_of
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference, reference_packed


class Kept:
    """One unpadded batch: feed it tokens, cut it; ``seen`` ``[B, Hkv, K]`` of each layer stays."""

    def __init__(self, model: Any, config: EvictionConfig, head_scores: Any = ()) -> None:
        self.model, self.config, self.head_scores = copy.deepcopy(model), config, head_scores
        self.model.set_attn_implementation("keeping")
        self.cache, self.seen, self.calls = DynamicCache(), {}, {}
        self.queries: dict[int, Tensor] = {}

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """The last logits."""
        _current.append(self)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        _current.clear()
        return out.logits[:, -1]

    @property
    def entries(self) -> int:
        """Of a row, per head, on average over all layers."""
        heads = torch.cat([seen[0].sum(-1) for seen in self.seen.values()])
        assert int(heads.sum()) % heads.numel() == 0
        return int(heads.sum()) // heads.numel()

    def cut(self, budget: int, queries: int) -> None:
        """To ``budget`` entries per head, scored by the last ``queries``."""
        config, layers = self.config, sorted(self.calls)
        bases, norms = [], []
        for i in layers:
            module, key, value, scale = self.calls[i]
            query = self.queries[i][:, :, -queries:]
            groups, seen = query.shape[1] // key.shape[1], self.seen[i]
            bases.append(
                torch.cat([
                    reference.window_attention(
                        query[b : b + 1, h * groups : (h + 1) * groups], key[b : b + 1, h : h + 1],
                        scale, config.window_size, config.kernel_size, real=seen[b, h][None],
                    )
                    for b in range(len(key)) for h in range(key.shape[1])
                ]).view(key.shape[:3])
            )  # fmt: skip
            weight, in_out = weight_of(module.o_proj)
            norms.append(
                reference.projected_norm(value, weight, in_out, query.shape[1], config.norm)
            )
        rows = torch.full((len(bases[0]),), budget)
        budgets = reference_packed.head_budgets(
            bases, rows, config.window_size, [self.seen[i] for i in layers], config.allocation,
            config.safeguard, self.head_scores,
        )  # fmt: skip
        for i, base, norm, lengths in zip(layers, bases, norms, budgets, strict=True):
            self.seen[i] = self._selected(i, base, norm, lengths)

    def _selected(self, layer: int, base: Tensor, norm: Tensor, lengths: Tensor) -> Tensor:
        config, kept = self.config, torch.zeros_like(self.seen[layer])
        for b in range(len(base)):
            for h in range(base.shape[1]):
                count, own = int(lengths[b, h]), self.seen[layer][b, h]
                if count == int(own.sum()):
                    kept[b, h] = own
                    continue
                one = (slice(b, b + 1), slice(h, h + 1))
                places = reference.select(
                    base[one], norm[one], count, config.window_size, config.first_stage_ratio,
                    config.epsilon, own[None], torch.tensor([count]),
                )  # fmt: skip
                kept[b, h, places[0, 0]] = True
        return kept

    def assert_held_by(self, cache: Any, row: int = 0) -> None:
        """The cache's entries of every head are those that stay here; ``row`` is our first."""
        for i, layer in enumerate(cache.layers):
            _, key, value, _ = self.calls[i]
            for b in range(len(key)):
                for h in range(key.shape[1]):
                    slot = (row + b) * key.shape[1] + h
                    begin, end = layer.packed.cu_kv_lens[slot : slot + 2].tolist()
                    for packed, tail, whole in (
                        (layer.packed.keys, layer.keys, key),
                        (layer.packed.values, layer.values, value),
                    ):
                        held = torch.cat([packed[begin:end], tail[row + b, h]])
                        expected = whole[b, h, self.seen[i][b, h]]
                        torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-4)


_current: list[Kept] = []


def _keeping(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> tuple[Tensor, None]:
    (kept,), layer = _current, module.layer_idx
    q_len, kv_len = query.shape[2], key.shape[2]
    before = kept.seen.get(layer, torch.ones(*key.shape[:2], 0, dtype=torch.bool))
    seen = F.pad(before, (0, kv_len - before.shape[2]), value=True)
    kept.seen[layer], kept.calls[layer] = seen, (module, key, value, scaling)
    old = kept.queries.get(layer)
    kept.queries[layer] = query if old is None else torch.cat([old, query], dim=2)
    causal = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    seen = seen.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None] & causal
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("keeping", _keeping)
