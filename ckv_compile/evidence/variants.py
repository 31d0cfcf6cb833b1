"""Selections that are no option of the library: what the studies compare it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import EvictionConfig
from ..kernels.adapters import with_adapters
from ..kernels.projected_norm import projected_norm
from ..kernels.window_attention import window_attention
from .candidates import Candidate, Keeps, config_of
from .probe import Remembered, Seen

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def variant(label: str, keeps: Keeps = Seen.kept, **options: Any) -> Candidate:
    """CriticalKV with another selection or other options."""
    return Candidate(label, config_of({"method": "criticalkv", **options}), keeps)


def relative_epsilon(times: float) -> Keeps:
    """``epsilon = times / K``: a share of the mean attention, whatever the length."""

    def keeps(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
        return seen.kept(dataclasses.replace(config, epsilon=times / seen.kv_len), budget)

    return keeps


def window_apart(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """Alpha is a share of what is kept beside the window, not of the budget with it.

    The paper's code gives stage 1 ``max(floor(alpha * b) - w, 0)`` entries beside the window, which
    is none for ``b <= 2 * w``: attention alone then chooses nothing, and sigma may stay below 0.5.
    """
    window = min(config.window_size, budget)
    ratio = (window + config.first_stage_ratio * (budget - window)) / budget
    return seen.kept(dataclasses.replace(config, first_stage_ratio=min(ratio, 1.0)), budget)


def norm_first(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """Stage 2 pools attention times norm, where the paper's code multiplies what is pooled.

    Pooling gives a token's attention to its neighbours. Multiplied afterwards, a neighbour with a
    larger norm goes before the token that was attended to.
    """
    alone = dataclasses.replace(config, kernel_size=1)
    attention, norm = _scores(seen, alone)
    assert norm is not None
    products, base = (attention + config.epsilon) * norm, _scores(seen, config)[0]
    # The window takes no part in pooling, as in the library.
    products[..., -config.window_size :] = 0
    width = config.kernel_size
    pooled = F.max_pool1d(products, width, stride=1, padding=width // 2)
    # Such that (base + epsilon) * norm is what is pooled.
    return seen.selected(base, pooled / (base + config.epsilon).clamp(min=1e-30), config, budget)


def with_sink(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """The method's scores, but the first four tokens are always kept."""
    base, norm = _scores(seen, config)
    base = base.clone()
    base[:, :, :4] = 2.0
    norm = None if norm is None else norm.clone()
    if norm is not None:
        norm[:, :, :4] = norm.max() * 1e6
    return seen.selected(base, norm, config, budget)


def per_query_head(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """Attention times norm for each query head, and then the mean over the group.

    The library takes both means first and multiplies them.
    """
    attention, norms = _attention_by_head(seen, config), _norms_by_head(seen)
    batch, kv_heads = seen.inputs.key.shape[:2]
    products = (attention + config.epsilon) * norms
    base, mean = (
        x.reshape(batch, kv_heads, -1, seen.kv_len).mean(2) for x in (attention, products)
    )
    # Such that (base + epsilon) * norm is the mean product.
    norm = mean / (base + config.epsilon).clamp(min=1e-30)
    return seen.selected(base, norm, config, budget)


def largest_of_group(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """The largest attention of a group's heads, not their mean."""
    batch, kv_heads = seen.inputs.key.shape[:2]
    attention = _attention_by_head(seen, config).reshape(batch, kv_heads, -1, seen.kv_len)
    return seen.selected(attention.amax(2), _scores(seen, config)[1], config, budget)


def centred(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
    """The norm of ``(v_i - v) W_O``, ``v`` the mean value by attention.

    What an entry's loss moves is its distance from what the others give: values that are alike
    stand in for each other once the attention is renormalised.
    """
    base, _ = _scores(seen, config)
    shares = base / base.sum(-1, keepdim=True).clamp(min=1e-30)
    value = seen.inputs.value.float()
    value = value - (shares[..., None] * value).sum(2, keepdim=True)
    inputs = dataclasses.replace(seen.inputs, value=value, config=config, memo={})
    return seen.selected(base, inputs.projected_norm(), config, budget)


def per_head_ratio(ratios: Mapping[str, list[float]]) -> Keeps:
    """A first-stage ratio for each KV head of each site, as :func:`calibrated` finds them."""

    def keeps(seen: Seen, config: EvictionConfig, budget: int) -> Tensor:
        rows = [
            seen.kept(dataclasses.replace(config, first_stage_ratio=ratio), budget)[:, h : h + 1]
            for h, ratio in enumerate(ratios[seen.name])
        ]
        return torch.cat(rows, dim=1)

    return keeps


def calibrated(report: Any, budget: float) -> dict[str, list[float]]:
    """The ratio with the least perturbation of each KV head, of candidates named by ratios."""
    found = {}
    for rows in zip(*(report.of(ratio_label(ratio), budget) for ratio in RATIOS), strict=True):
        by_head = torch.tensor([row.group for row in rows])  # [ratios, Hkv]
        found[rows[0].site] = [RATIOS[i] for i in by_head.argmin(0).tolist()]
    return found


def ratio_label(ratio: float) -> str:
    return f"alpha {ratio:g}"


def _scores(seen: Seen, config: EvictionConfig) -> tuple[Tensor, Tensor | None]:
    inputs = dataclasses.replace(seen.inputs, config=config)
    return inputs.window_attention(), inputs.projected_norm() if config.method != "snapkv" else None


def _attention_by_head(seen: Seen, config: EvictionConfig) -> Tensor:
    """Pooled window attention of each query head, ``[B, H, K]``."""
    inputs: Remembered = seen.inputs
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key = inputs.key.repeat_interleave(groups, dim=1)
    options = (inputs.scale, config.window_size, config.kernel_size, inputs.softcap)
    memo = ("by head", config.window_size, config.kernel_size)
    return inputs._once(
        memo,
        lambda: window_attention(inputs.query, key, *options, bias=inputs.bias, sinks=inputs.sinks),
    )


def _norms_by_head(seen: Seen) -> Tensor:
    """``||v_i W_O^h||_1`` of each query head, ``[B, H, K]``."""
    inputs = seen.inputs
    heads = inputs.query.shape[1]
    assert inputs.o_proj_weight is not None
    weight = with_adapters(inputs.o_proj_weight, inputs.in_out, inputs.adapters)
    value = inputs.value.repeat_interleave(heads // inputs.key.shape[1], dim=1)
    compute = lambda: projected_norm(value, weight, inputs.in_out, heads, "l1")  # noqa: E731
    return inputs._once(("norm by head",), compute)


# What the commands know beside the library's methods.
VARIANTS: dict[str, Keeps] = {
    "centred": centred,
    "per-query-head": per_query_head,
    "largest-of-group": largest_of_group,
    "sink-kept": with_sink,
    "window-apart": window_apart,
    "norm-first": norm_first,
}
