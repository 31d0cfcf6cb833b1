"""CriticalKV over any base (arXiv 2502.03805, Algorithm 1)."""

from __future__ import annotations

from .base import ScoreInputs, Scores, scores_of


def criticalkv(inputs: ScoreInputs) -> Scores:
    """Attention first, then attention times the norm of the projected value.

    Keeping a set N of a head's entries moves its output by at most
    ``theta = C - (2 - 1/sigma) * sum_{i in N} A_i ||v_i W_O||_1`` with ``sigma = sum_{i in N} A_i``
    (Theorem 3). Stage 1 makes sigma > 0.5; with sigma frozen there, ``theta_hat >= theta`` is least
    for the largest ``A_i ||v_i W_O||_1``, which stage 2 takes. ``theta`` itself is not guaranteed
    to be lower than that of attention alone, whose sigma is larger. With ``norm="value"`` the norm
    is ``||v_i||_1``, which says nothing of the layer's output, and there is no such bound.

    Attention is what ``config.base`` scores by, SnapKV's as in the paper. Over a base that has
    weighed the values already there is no such bound either.
    """
    return Scores(scores_of(inputs.config.base, inputs).base, inputs.norm_to_select_by())
