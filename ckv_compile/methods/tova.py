"""TOVA (arXiv 2401.06104): the last query decides, for all heads alike."""

from __future__ import annotations

from .base import ScoreInputs, Scores


def tova(inputs: ScoreInputs) -> Scores:
    """``mean_h A[h, n-1, i]``: the last query's attention, mean over all heads of the layer.

    The window is kept beside it as with every method; the paper's own has ``window_size=1``.
    """
    attention = inputs.attention_rows("mean", asked=1)  # [B, H, K]
    return Scores(attention.mean(1, keepdim=True).expand(inputs.key.shape[:3]))
