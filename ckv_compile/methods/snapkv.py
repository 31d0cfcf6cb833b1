"""SnapKV (arXiv 2404.14469): attention alone."""

from __future__ import annotations

from .base import ScoreInputs, Scores


def snapkv(inputs: ScoreInputs) -> Scores:
    """Pooled mean attention of the window decides."""
    return Scores(inputs.window_attention())
