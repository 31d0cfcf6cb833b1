"""A head's output before and after a cut, and the bound of CriticalKV's theorem, in numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.adapters import with_adapters
from ..kernels.projected_norm import projected_norm
from .probe import Seen


class LastQueries:
    """The attention of the last queries of one site, KV head by KV head."""

    def __init__(self, seen: Seen, queries: int) -> None:
        inputs = seen.inputs
        self.seen, self.queries = seen, queries
        self.batch, self.kv_heads = inputs.key.shape[:2]
        self.heads = inputs.query.shape[1]
        self.groups = self.heads // self.kv_heads
        weight = with_adapters(inputs.o_proj_weight, inputs.in_out, inputs.adapters)
        rows = weight.float() if inputs.in_out else weight.float().t()
        self.weight = rows.reshape(self.heads, -1, rows.shape[1])  # [H, Dv, E]
        self.parts = [[self._part(b, g) for g in range(self.kv_heads)] for b in range(self.batch)]

    def _part(self, b: int, g: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Attention ``[G, q, K]``, a sink's ``[G, q, 1]``, values ``[K, Dv]``, norms and C."""
        inputs, heads = self.seen.inputs, slice(g * self.groups, (g + 1) * self.groups)
        attention, sink = _softmax(inputs, b, g, heads, self.queries)
        value = inputs.value[b, g].float()
        norms = torch.stack([
            projected_norm(value[None, None], self.weight[h], True, 1, "l1")[0, 0]
            for h in range(heads.start, heads.stop)
        ])  # fmt: skip
        return attention, sink, value, norms, (attention @ norms[..., None])[..., 0]

    def kept(self, keep: Tensor, first: Tensor) -> dict[str, Any]:
        """The numbers of a row, for the kept positions ``[B, Hkv or 1, b]``."""
        names = ("perturbation", "theta", "sigma_first", "sigma")
        by_head = {name: torch.zeros(self.heads) for name in names}
        group = torch.zeros(self.kv_heads)
        layer = output = 0.0
        for b in range(self.batch):
            moved = whole = torch.zeros(self.queries, self.weight.shape[2])
            for g in range(self.kv_heads):
                index, stage = (x[b, g % x.shape[1]] for x in (keep, first))
                attention, sink, value, norms, total = self.parts[b][g]
                at = slice(g * self.groups, (g + 1) * self.groups)
                held = attention[..., index]
                sigma = held.sum(-1, keepdim=True) + sink  # [G, q, 1]
                full = attention @ value
                change = (full - (held @ value[index]) / sigma) @ self.weight[at]  # [G, q, E]
                terms = (held @ norms[:, index, None])[..., 0]
                theta = total - (2 - 1 / sigma[..., 0]) * terms
                stage_1 = attention[..., stage].sum(-1) + sink[..., 0]
                found = (change.abs().sum(-1), theta, stage_1, sigma[..., 0])
                for name, numbers in zip(names, found, strict=True):
                    by_head[name][at] += numbers.mean(-1) / self.batch
                together = change.sum(0)
                group[g] += together.abs().sum(-1).mean() / self.batch
                moved, whole = moved + together, whole + (full @ self.weight[at]).sum(0)
            layer += float(moved.abs().sum(-1).mean()) / self.batch
            output += float(whole.abs().sum(-1).mean()) / self.batch
        lists = {name: tuple(numbers.tolist()) for name, numbers in by_head.items()}
        return {**lists, "group": tuple(group.tolist()), "layer": layer, "output": output}


def _softmax(inputs: Any, b: int, g: int, heads: slice, queries: int) -> tuple[Tensor, Tensor]:
    """Attention of the last queries ``[G, q, K]``, and what a sink takes of it ``[G, q, 1]``."""
    query, key = inputs.query[b, heads, -queries:].float(), inputs.key[b, g].float()
    scale = query.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
    logits = query @ key.t() * scale
    if inputs.softcap is not None:
        logits = (logits / inputs.softcap).tanh() * inputs.softcap
    kv_len = key.shape[0]
    if inputs.bias is not None:
        bias = inputs.bias.expand(len(inputs.query), inputs.query.shape[1], kv_len, kv_len)
        logits = logits + bias[b, heads, -queries:].float()
    positions = torch.arange(kv_len)
    logits = logits.masked_fill(positions > positions[-queries:, None], -torch.inf)
    if inputs.sinks is None:
        return logits.softmax(-1), logits.new_zeros(*logits.shape[:2], 1)
    sink = inputs.sinks[heads].float()[:, None, None].expand(-1, queries, 1)
    # A sink is one more entry, which is always kept and whose value is zero.
    attention = torch.cat([logits, sink], dim=-1).softmax(-1)
    return attention[..., :-1], attention[..., -1:]
