"""Key norms (arXiv 2406.11430): short keys draw attention."""

from __future__ import annotations

from torch.linalg import vector_norm

from .base import ScoreInputs, Scores


def knorm(inputs: ScoreInputs) -> Scores:
    """``-||k_i||_2``: no query is read. Never positive, so no base of CriticalKV's."""
    return Scores(-vector_norm(inputs.key.float(), dim=-1))
