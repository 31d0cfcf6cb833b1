"""The eager loop that eviction must agree with: the unmodified model, its K and V cut by hand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.pytorch_utils import Conv1D

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference, reference_packed


@dataclasses.dataclass(frozen=True)
class Recorded:
    """One layer's attention as the model called it; K and V before any repetition."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None

    def scores(self, config: EvictionConfig) -> tuple[Tensor, Tensor]:
        """Attention and norms ``[B, Hkv, K]`` by the oracle."""
        names = ("o_proj", "dense", "out_proj", "c_proj")
        projection = next(m for n in names if (m := getattr(self.module, n, None)) is not None)
        weight, in_out = weight_of(projection)
        scores = reference.window_attention(
            self.query, self.key, self.scale, config.window_size, config.kernel_size
        )
        norms = reference.projected_norm(
            self.value, weight, in_out, self.query.shape[1], config.norm
        )
        return scores, norms

    def keep(self, config: EvictionConfig, seen: int) -> Tensor:
        """Kept positions ``[B, Hkv, budget]`` by the oracle, after ``seen`` tokens."""
        scores, norms = self.scores(config)
        return reference.select(
            scores,
            norms if config.method == "criticalkv" else None,
            min(config.entries(seen), self.key.shape[2]),
            config.window_size,
            config.first_stage_ratio,
            config.epsilon,
        )


@torch.no_grad()
def weight_of(projection: torch.nn.Module) -> tuple[Tensor, bool]:
    """``W_O`` and whether it is ``[in, out]``; adapted or quantised, by what the layer does."""
    plain = type(projection) in (torch.nn.Linear, Conv1D)
    if plain and type(projection.weight) is torch.nn.Parameter:
        return projection.weight, type(projection) is Conv1D
    unit = torch.eye(projection.in_features)
    return projection(unit) - projection(torch.zeros_like(unit)), True


_calls: list[Recorded] = []


def _recording(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> tuple[Tensor, None]:
    _calls.append(Recorded(module, query, key, value, scaling))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1,
        scale=scaling, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", _recording)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, config: EvictionConfig) -> tuple[Tensor, DynamicCache]:
    """Last logits and the cut cache of an uncompiled prefill."""
    return prefill_in_pieces(model, [ids], config)


@torch.no_grad()
def prefill_in_pieces(
    model: Any, pieces: list[Tensor], config: EvictionConfig
) -> tuple[Tensor, DynamicCache]:
    """The same for a prompt that is fed in pieces, cut to the budget of all so far after each."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("recording")
    cache, seen = DynamicCache(), 0
    for piece in pieces:
        _calls.clear()
        held, extra = cache.get_seq_length(), {}
        if seen:
            # A plain cache has lost the positions of what it holds: mask and positions by hand.
            q_len = piece.shape[1]
            extra["position_ids"] = torch.arange(seen, seen + q_len)[None]
            allowed = torch.ones(q_len, held + q_len, dtype=torch.bool).tril(held)
            extra["attention_mask"] = allowed[None, None]
        out = model(input_ids=piece, past_key_values=cache, use_cache=True, **extra)
        seen += piece.shape[1]
        for layer, call in zip(cache.layers, list(_calls), strict=True):
            keep = call.keep(config, seen)
            layer.keys, layer.values = reference.compact(call.key, call.value, keep)
    return out.logits[:, -1], cache


@torch.no_grad()
def generate(model: Any, ids: Tensor, config: EvictionConfig, steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens ``[B, steps]`` and logits ``[B, steps, V]`` over the cut cache."""
    logits, cache = prefill(model, ids, config)
    tokens, all_logits = [], []
    for step in range(steps):
        all_logits.append(logits)
        tokens.append(logits.argmax(-1, keepdim=True))
        position = torch.full_like(tokens[-1], ids.shape[1] + step)
        extra = {"position_ids": position} if _takes_positions(model) else {}
        out = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, **extra)
        logits = out.logits[:, -1]
    return torch.cat(tokens, 1), torch.stack(all_logits, 1)


@torch.no_grad()
def packed_prefill(
    model: Any, ids: Tensor, config: EvictionConfig, head_scores: Any = ()
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer keeps of a prompt, K and V ``[T, *]`` and where the heads begin."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("recording")
    _calls.clear()
    model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    calls = list(_calls)
    bases, norms = zip(*(call.scores(config) for call in calls), strict=True)
    real = torch.ones_like(ids, dtype=torch.bool)
    rows = torch.full((len(ids),), config.entries(ids.shape[1]))
    window = config.window_size
    asked = [reference_packed.layer_preference(c.query, c.key, c.scale, window) for c in calls]
    budgets = reference_packed.head_budgets(
        bases, rows, window, real, config.allocation, config.safeguard, head_scores,
        torch.stack(asked, 1),
    )  # fmt: skip
    return [
        reference_packed.pack(
            [call.key], [call.value], [base], [norm] if config.method == "criticalkv" else [],
            [budget], window, config.first_stage_ratio, config.epsilon, real,
        )
        for call, base, norm, budget in zip(calls, bases, norms, budgets, strict=True)
    ]  # fmt: skip


@torch.no_grad()
def generate_packed(model: Any, ids: Tensor, kept: list[Any], steps: int) -> Tensor:
    """Greedy tokens ``[B, steps]`` of a model that keeps all and does not see what is not kept."""
    model = copy.deepcopy(model)
    cache = DynamicCache()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    _hidden.clear()
    for layer, (key, _, cu) in zip(cache.layers, kept, strict=True):
        hidden = torch.ones(layer.keys.shape[:3], dtype=torch.bool)
        for slot in range(len(cu) - 1):
            b, h = divmod(slot, layer.keys.shape[1])
            entries = key[cu[slot] : cu[slot + 1], None]
            distance = (entries - layer.keys[b, h]).abs().amax(-1)
            assert bool((distance.min(-1).values < 1e-4).all())
            hidden[b, h, distance.argmin(-1)] = False
        _hidden.append(hidden)
    model.set_attn_implementation("hiding")
    tokens = []
    for _ in range(steps):
        tokens.append(logits.argmax(-1, keepdim=True))
        logits = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True).logits[:, -1]
    return torch.cat(tokens, 1)


_hidden: list[Tensor] = []


def _hiding(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
) -> tuple[Tensor, None]:
    hidden = _hidden[module.layer_idx]
    seen = F.pad(~hidden, (0, key.shape[2] - hidden.shape[2]), value=True)
    seen = seen.repeat_interleave(query.shape[1] // key.shape[1], dim=1)[:, :, None]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("hiding", _hiding)


def _takes_positions(model: Any) -> bool:
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters
