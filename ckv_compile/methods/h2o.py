"""H2O (arXiv 2306.14048): heavy hitters, by the attention of all queries."""

from __future__ import annotations

from .base import ScoreInputs, Scores


def h2o(inputs: ScoreInputs) -> Scores:
    """``sum_t A[t, i] / |{t: t >= i}|`` over all queries of the call; mean over the group.

    The paper sums alone, which favours early tokens: more queries can see them. Of a later piece of
    a prompt, its own queries score what the earlier ones left. All queries means as many logits
    once more as attention itself has.
    """
    return Scores(inputs.mean_of_groups(inputs.attention_rows("mean", asked=None)))
