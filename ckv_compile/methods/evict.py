"""The body of the eviction node: score, select, compact."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..budget import CacheBytes
from ..config import EvictionConfig
from ..kernels.adapters import Adapters
from ..kernels.compact import compact
from ..kernels.select import select
from ..kernels.window_attention import with_heads
from ..registry import identity_of
from .base import ScoreInputs, real_columns, scores_of


class EvictKV(nn.Module):
    """``ckv_evict_i`` in the graph: the K and V that a prefill leaves in the cache, cut to budget.

    Args:
        config: the options; the budget is read from it unless a call brings ``capacity``.
        in_out: whether the weight is ``[H*Dv, E]`` (Conv1D, ``addmm``) or ``[E, H*Dv]`` (linear).
        from_config: whether the budget is ``config.budget``, not ``capacity``.
        row_bytes: of one entry in all caches of the graph that are cut, for a batch of one; what a
            budget in bytes is counted by.
        cross: whether K and V are an encoder's: no entry is exempt.
    """

    def __init__(
        self,
        config: EvictionConfig,
        in_out: bool,
        from_config: bool,
        row_bytes: int = 0,
        cross: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.in_out, self.from_config = config, in_out, from_config
        self.row_bytes, self.cross = row_bytes, cross

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        o_proj_weight: Tensor | None,
        scale: Any = None,
        softcap: Any = None,
        capacity: Tensor | None = None,
        padding: Tensor | None = None,
        row_budgets: Tensor | None = None,
        gap: Tensor | None = None,
        cached: tuple[Tensor, Tensor] | None = None,
        biases: tuple[Tensor, ...] = (),
        sinks: Tensor | None = None,
        adapters: Adapters = (),
        expected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, Hkv, K, D]`` to ``[B, Hkv, budget, D]``, and where those stood.

        The size of ``capacity`` is the budget. ``biases``, broadcast to ``[B, H, Q, K]``, are added
        to the logits, ``sinks`` ``[H]`` are logits beside them.

        ``padding`` ``[B, K]`` is false at pads; row ``b`` then keeps ``row_budgets[b]`` entries, in
        its last slots. With ``gap`` its first columns, as many as ``gap`` counts, are of tokens
        that an earlier eviction has taken.

        ``cached``, two tensors ``[B, 1, K, *]``, is what the cache holds where ``key`` and
        ``value`` are made of it for all heads: an entry then counts what its heads give it on
        average, as the heads of a group do.

        ``adapters`` are added to ``o_proj_weight``, which is None where no score asks for it.
        ``expected`` ``[B, H, Q, D]`` are the queries as later positions would turn them.
        """
        kv_len = key.shape[2]
        if capacity is None:
            budget = self.config.entries(kv_len, CacheBytes(key.shape[0] * self.row_bytes))
        else:
            budget = torch.sym_min(capacity.shape[0], kv_len)
        real = real_columns(padding, gap, kv_len)
        inputs = ScoreInputs(
            query,
            key,
            value,
            o_proj_weight,
            self.in_out,
            scale,
            softcap,
            self.config,
            real,
            sum(with_heads(bias, query.shape[1]) for bias in biases) if biases else None,
            sinks,
            self.cross,
            adapters,
            expected,
        )
        scores = scores_of(self.config.method, inputs)
        base, norm = scores.base, scores.norm
        if cached is not None:
            key, value = cached
            base = base.mean(1, keepdim=True)
            made = scores.made_norm
            norm = None if made is None else made.mean(1, keepdim=True)
        keep = select(
            base,
            norm,
            budget,
            0 if self.cross else self.config.window_size,
            self.config.first_stage_ratio,
            self.config.epsilon,
            real,
            row_budgets,
            inputs.triton,
        )
        return *compact(key, value, keep, inputs.triton), keep

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        config = self.config
        counted = f"{config.budget}, row_bytes={self.row_bytes}"
        budget = counted if self.from_config else "an input of the graph"
        return (
            f"{scored_by(config, self.in_out)}, budget={budget}, "
            f"first_stage_ratio={config.first_stage_ratio}, epsilon={config.epsilon}, "
            f"cross={self.cross}"
        )


class ScoreKV(nn.Module):
    """``ckv_score_i`` in the graph: what a layer's entries score; a later node cuts them."""

    def __init__(self, config: EvictionConfig, in_out: bool) -> None:
        super().__init__()
        self.config, self.in_out = config, in_out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        o_proj_weight: Tensor | None,
        scale: Any = None,
        padding: Tensor | None = None,
        gap: Tensor | None = None,
        adapters: Adapters = (),
        expected: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Base scores ``[B, Hkv, K]`` and, if the method has one, the norm; as for ``EvictKV``.

        Last, if the allocation weighs layers, what this one asks for, ``[B]``.
        """
        real = real_columns(padding, gap, key.shape[2])
        operands = (query, key, value, o_proj_weight, self.in_out, scale, None)
        inputs = ScoreInputs(*operands, self.config, real, adapters=adapters, expected=expected)
        scores = scores_of(self.config.method, inputs)
        norm = scores.made_norm
        parts = (scores.base,) if norm is None else (scores.base, norm)
        return (*parts, inputs.layer_preference()) if self.config.weighs_layers else parts

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        weighs = self.config.weighs_layers
        return f"{scored_by(self.config, self.in_out)}, weighs_layers={weighs}"


def scored_by(config: EvictionConfig, in_out: bool) -> str:
    """All that scores depend on."""
    return (
        f"method={identity_of(config.method)}, base={identity_of(config.base)}, "
        f"window_size={config.window_size}, kernel_size={config.kernel_size}, "
        f"norm={config.norm}, in_out={in_out}"
    )
