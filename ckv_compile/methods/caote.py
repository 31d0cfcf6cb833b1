"""CAOTE (arXiv 2504.14051): how far a head's output moves when one entry is dropped."""

from __future__ import annotations

from .base import ScoreInputs, Scores


def caote(inputs: ScoreInputs) -> Scores:
    """``A_i / (1 - A_i) * ||o - v_i||_2``, mean over the window's queries and over the group.

    With i dropped the head's output is ``(o - A_i v_i) / (1 - A_i)``: the score is the length of
    the exact change. ``o = sum_i A_i v_i`` before the output projection, of each query. The paper
    scores for one query at a time, as it decodes; the mean over the window is ours.
    """
    return Scores(inputs.mean_of_groups(inputs.attention_rows("drop", values=True)))
