"""Scores of heads that an earlier cut has left with different entries: one head at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvictionConfig
from ..kernels.adapters import Adapters, with_adapters
from .base import ScoreInputs, Scores, real_columns, scores_of
from .evict import scored_by


class ScorePacked(nn.Module):
    """``ckv_score_i`` in a graph that cuts a packed cache again: see :class:`ScoreKV`."""

    def __init__(self, config: EvictionConfig, in_out: bool) -> None:
        super().__init__()
        self.config, self.in_out = config, in_out
        self.two_stages = has_norm(config)

    def forward(
        self,
        query: Tensor,
        packed_key: Tensor,
        packed_value: Tensor,
        cu_kv_lens: Tensor,
        key: Tensor,
        value: Tensor,
        o_proj_weight: Tensor | None,
        scale: Any = None,
        padding: Tensor | None = None,
        gap: Tensor | None = None,
        adapters: Adapters = (),
    ) -> tuple[Tensor, ...]:
        """Base scores of the tail ``[B, Hkv, t]`` and of the packed entries before it ``[T]``.

        Then the norms, if the method has any. ``query`` ``[B, H, Q, D]`` are those of the last Q
        tokens of the tail; the other arguments as for ``EvictKV`` and ``AttendPacked``. In a store
        that layers share the scores of others are 0.
        """
        if o_proj_weight is not None:
            o_proj_weight = with_adapters(o_proj_weight, self.in_out, adapters)
        config = self.config
        tail, packed = torch.ops.ckv_compile.score_packed(
            query, packed_key, packed_value, cu_kv_lens, key, value, o_proj_weight, self.in_out,
            scale, real_columns(padding, gap, key.shape[2]), 1 + self.two_stages, config.method,
            config.base, config.window_size, config.kernel_size, config.norm, config.lowering,
        )  # fmt: skip
        pairs = zip(tail.unbind(), packed.unbind(), strict=True)
        return tuple(part for pair in pairs for part in pair)

    def extra_repr(self) -> str:
        """All that the body depends on; the compile cache is keyed by it."""
        return f"{scored_by(self.config, self.in_out)}, two_stages={self.two_stages}"


def has_norm(config: EvictionConfig) -> bool:
    """Whether the method scores for two stages: it is asked about two entries."""
    one = torch.zeros(1, 1, 2, 1)
    inputs = ScoreInputs(one, one, one, torch.zeros(1, 1), False, None, None, config)
    return scores_of(config.method, inputs).norm is not None


# Opaque to the compiler: lengths differ from head to head and are known only when it runs. On a GPU
# it waits for the device, once.
@torch.library.custom_op("ckv_compile::score_packed", mutates_args=())
def _score_packed(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    cu_kv_lens: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    in_out: bool,
    scale: float | None,
    real: Tensor | None,
    stages: int,
    method: str,
    base: str,
    window_size: int,
    kernel_size: int,
    norm: str,
    lowering: str,
) -> tuple[Tensor, Tensor]:
    (batch, kv_heads, length, value_dim), starts = value.shape, cu_kv_lens.tolist()
    config = EvictionConfig(
        method=method, base=base, window_size=window_size, kernel_size=kernel_size, norm=norm,
        lowering=lowering,
    )  # fmt: skip
    tail = key.new_zeros((stages, batch, kv_heads, length), dtype=torch.float32)
    packed = key.new_zeros((stages, len(packed_key)), dtype=torch.float32)
    groups = query.shape[1] // kv_heads
    for h in range(kv_heads):
        members = slice(h * groups, (h + 1) * groups)
        columns = slice(members.start * value_dim, members.stop * value_dim)
        part = None
        if weight is not None:
            part = weight[columns] if in_out else weight[:, columns]
        for b in range(batch):
            begin, end = starts[b * kv_heads + h : b * kv_heads + h + 2]
            own_key = torch.cat([packed_key[begin:end], key[b, h]])[None, None]
            own_value = torch.cat([packed_value[begin:end], value[b, h]])[None, None]
            seen = None
            if real is not None:
                seen = torch.cat([real.new_ones(end - begin), real[b]])[None]
            operands = (query[b : b + 1, members], own_key, own_value, part, in_out, scale, None)
            inputs = ScoreInputs(*operands, config, seen)
            for stage, scores in enumerate(_stages(scores_of(method, inputs))):
                packed[stage, begin:end] = scores[0, 0, : end - begin]
                tail[stage, b, h] = scores[0, 0, end - begin :]
    return tail, packed


@_score_packed.register_fake
def _(
    query: Tensor,
    packed_key: Tensor,
    packed_value: Tensor,
    cu_kv_lens: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None,
    in_out: bool,
    scale: float | None,
    real: Tensor | None,
    stages: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty((stages, *key.shape[:3]), dtype=torch.float32),
        key.new_empty((stages, packed_key.shape[0]), dtype=torch.float32),
    )


def _stages(scores: Scores) -> tuple[Tensor, ...]:
    norm = scores.made_norm
    return (scores.base,) if norm is None else (scores.base, norm)
