"""VATP (arXiv 2406.12335): attention times the size of the value."""

from __future__ import annotations

from .base import ScoreInputs, Scores


def vatp(inputs: ScoreInputs) -> Scores:
    """``A_i ||v_i||_1``, A the window's mean attention, not pooled; mean over the group.

    The paper also keeps the first 20 tokens whatever they score; here they must earn it.
    """
    return Scores(inputs.window_attention(kernel_size=1) * inputs.value.float().abs().sum(-1))
