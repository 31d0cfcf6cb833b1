"""What a method is given and what it gives back."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ..config import EvictionConfig
from ..kernels.adapters import Adapters, with_adapters
from ..kernels.device import takes_triton
from ..kernels.projected_norm import projected_norm
from ..kernels.window_attention import cross_attention, window_attention


@dataclasses.dataclass(frozen=True)
class Scores:
    """``base`` and ``norm`` are ``[B, Hkv, K]`` float32, higher = keep.

    With a norm the selection has two stages, see :func:`ckv_compile.kernels.select.select`.
    """

    base: Tensor
    norm: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ScoreInputs:
    """One attention site at eviction time. Lazy: what a method does not call is never traced."""

    query: Tensor  # [B, H, Q, D]
    key: Tensor  # [B, Hkv, K, D]
    value: Tensor  # [B, Hkv, K, Dv]
    o_proj_weight: Tensor | None  # [E, H*Dv], or [H*Dv, E] if in_out
    in_out: bool
    scale: Any
    softcap: Any
    config: EvictionConfig
    real: Tensor | None = None  # [B, K] bool, False at pads
    bias: Tensor | None = None  # [B or 1, H or 1, Q or 1, K or 1], added to the logits
    sinks: Tensor | None = None  # [H], logits beside those of the keys
    cross: bool = False  # K and V are an encoder's
    adapters: Adapters = ()

    @property
    def triton(self) -> bool:
        """Whether the kernels are Triton's."""
        return takes_triton(self.key, self.config.lowering)

    def window_attention(self) -> Tensor:
        """Pooled mean attention of the observation window, ``[B, Hkv, K]``."""
        config = self.config
        operands = (self.query, self.key, self.scale, config.window_size, config.kernel_size)
        if self.cross:
            return cross_attention(*operands, self.softcap, self.sinks, self.triton)
        return window_attention(
            *operands, self.softcap, self.real, self.bias, self.sinks, self.triton
        )

    def projected_norm(self) -> Tensor:
        """``||v_i W_O||``, mean over the group, ``[B, Hkv, K]``; ``||v_i||`` if norm="value"."""
        heads, weight = self.query.shape[1], None
        if self.config.reads_projection:
            assert self.o_proj_weight is not None
            weight = with_adapters(self.o_proj_weight, self.in_out, self.adapters)
        norm = self.config.norm
        return projected_norm(self.value, weight, self.in_out, heads, norm, self.triton)
