"""What a method is given and what it gives back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..config import EvictionConfig
from ..kernels.adapters import Adapters, with_adapters
from ..kernels.attention_rows import attention_rows
from ..kernels.device import takes_triton
from ..kernels.layer_preference import layer_preference
from ..kernels.projected_norm import UnmadeNorm, projected_norms
from ..kernels.window_attention import cross_attention, window_attention, window_of
from ..registry import METHODS
from ..sizes import number_of


@dataclasses.dataclass(frozen=True)
class Scores:
    """``base`` and ``norm`` are ``[B, Hkv, K]`` float32, higher = keep.

    With a norm the selection has two stages, see :func:`ckv_compile.kernels.select.select`.
    """

    base: Tensor
    norm: Tensor | UnmadeNorm | None = None

    @property
    def made_norm(self) -> Tensor | None:
        """The norm of every entry."""
        return self.norm.made() if isinstance(self.norm, UnmadeNorm) else self.norm


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
    expected: Tensor | None = None  # [B, H, Q, D], see expected_query

    @property
    def triton(self) -> bool:
        """Whether the kernels are Triton's."""
        return takes_triton(self.key, self.config.lowering)

    def window_attention(self, kernel_size: int | None = None) -> Tensor:
        """Mean attention of the observation window, max-pooled, ``[B, Hkv, K]``.

        Over ``config.kernel_size`` neighbours unless another odd number is given; 1 is no pooling.
        """
        config = self.config
        width = config.kernel_size if kernel_size is None else kernel_size
        operands = (self.query, self.key, self.scale, config.window_size, width)
        if self.cross:
            return cross_attention(*operands, self.softcap, self.sinks, self.triton)
        return window_attention(
            *operands, self.softcap, self.real, self.bias, self.sinks, self.triton
        )

    def attention_rows(
        self, reduce: str, asked: int | None = -1, kernel_size: int = 1, values: bool = False
    ) -> Tensor:
        """What :func:`ckv_compile.kernels.attention_rows.attention_rows` makes, ``[B, H, K]``.

        ``asked`` queries, the last ones: by default those of the window, None for all. ``values``
        are needed by ``reduce="drop"`` alone.
        """
        window = self.config.window_size
        asked = window if asked == -1 else asked
        return attention_rows(
            self.query, self.key, self.value if values else None, self.scale, window, asked,
            reduce, kernel_size, self.softcap, self.real, self.bias, self.sinks, not self.cross,
        )  # fmt: skip

    def projected_norm(self) -> Tensor:
        """``||v_i W_O||``, mean over the group, ``[B, Hkv, K]``; ``||v_i||`` if norm="value"."""
        return self._norm().made()

    def norm_to_select_by(self) -> Tensor | UnmadeNorm:
        """The same for a selection, which may need it of few entries alone."""
        return self._norm()

    def _norm(self) -> UnmadeNorm:
        heads, norm = self.query.shape[1], self.config.norm
        return UnmadeNorm(self.value, self._weight(norm), self.in_out, heads, norm, self.triton)

    def projected_norms(self, norm: str | None = None) -> Tensor:
        """The same of each query head, ``[B, H, K]``; ``norm`` other than the config's."""
        heads, norm = self.query.shape[1], norm or self.config.norm
        return projected_norms(
            self.value, self._weight(norm), self.in_out, heads, norm, self.triton
        )

    def expected_query(self) -> Tensor:
        """The call's queries under the mean rotation of the next positions, ``[B, H, Q, D]``.

        As they are before their own rotary embedding, and then turned; in the model's dtype.
        """
        if self.expected is None:
            raise ValueError(
                f"method={self.config.method!r} asks for expected queries, which are read from a "
                f"compiled prefill alone; a method of your own says reads_rotation=True"
            )
        return self.expected

    def layer_preference(self) -> Tensor:
        """What the layer asks of a common budget, ``[B]``, for ``allocation="cake"``."""
        return layer_preference(
            self.query, self.key, self.scale, self.config.window_size, self.real
        )

    def prefix(self) -> Tensor:
        """The keys that are scored, ``[1 or B, 1, K]`` bool: real ones before the window."""
        positions = torch.arange(self.key.shape[2], device=self.key.device)
        if self.cross:
            return torch.ones_like(positions, dtype=torch.bool)[None, None]
        return window_of(positions, self.config.window_size, self.real)[1]

    def groups_of(self, scores: Tensor) -> Tensor:
        """``[B, H, K]`` as ``[B, Hkv, G, K]``."""
        return scores.unflatten(1, (self.key.shape[1], -1))

    def mean_of_groups(self, scores: Tensor) -> Tensor:
        """``[B, H, K]`` to ``[B, Hkv, K]``."""
        return self.groups_of(scores).mean(2)

    def _weight(self, norm: str) -> Tensor | None:
        """The output projection with what is added to it; None where the norm reads none."""
        if norm == "value":
            return None
        if self.o_proj_weight is None:
            raise ValueError(
                f"method={self.config.method!r} asks for projected norms and was registered "
                f"without reads_projection=True"
            )
        return with_adapters(self.o_proj_weight, self.in_out, self.adapters)


def real_columns(padding: Tensor | None, gap: Tensor | None, kv_len: Any) -> Tensor | None:
    """The columns of a mask ``[B, ..]`` that are of the ``kv_len`` entries held, as bool.

    Args:
        gap: counts the columns before them, of tokens that an eviction has taken.
    """
    if padding is None:
        return None
    real = padding.bool()
    return real if gap is None else real.narrow(1, number_of(gap), kv_len)


def scores_of(name: str, inputs: ScoreInputs) -> Scores:
    """Call a method and check what can be checked while it is traced.

    Raises:
        TypeError, ValueError: the method, a user's own, returned something else than it should.
    """
    scores = METHODS[name].function(inputs)
    if not isinstance(scores, Scores):
        raise TypeError(f"method {name!r} returned a {type(scores).__name__}; it returns Scores")
    heads = inputs.key.shape[1]
    for field, score in (("base", scores.base), ("norm", scores.norm)):
        right = field == "norm" and (score is None or isinstance(score, UnmadeNorm))
        if isinstance(score, Tensor):
            right = score.dtype == torch.float32 and score.dim() == 3 and score.shape[1] == heads
        if not right:
            what = f"{score.dtype} {tuple(score.shape)}" if isinstance(score, Tensor) else score
            raise ValueError(
                f"method {name!r} returned {field}={what}; it takes float32 [B, {heads}, K]"
            )
    return scores
