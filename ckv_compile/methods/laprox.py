"""LaProx (arXiv 2605.07234): the layer's output as a product of matrices, sampled."""

from __future__ import annotations

from ..kernels.pooling import average_pooled
from .base import ScoreInputs, Scores


def laprox(inputs: ScoreInputs) -> Scores:
    """``||A_h[:, i]||_2 * ||v_i W_O^h||_2`` per query head, pooled, mean over the group.

    The layer's output ``sum_h A_h (V_h W_O^h)`` is a sum of outer products of columns, from the
    window's ``w`` queries, and rows; an entry of it weighs what the product of their lengths is.
    The paper leaves open how a group's heads are combined and where to pool. Our choices: the
    product is made in each query head, its average is taken over ``kernel_size`` neighbours, those
    of them that lie before the window, and then over the heads of the group.

    ``norm="l1"`` counts as "l2", which is the method's; "value" takes the value's own L1 norm.
    """
    norm = "value" if inputs.config.norm == "value" else "l2"
    products = inputs.attention_rows("l2") * inputs.projected_norms(norm)  # [B, H, K]
    pooled = average_pooled(products, inputs.prefix(), inputs.config.kernel_size)
    return Scores(inputs.mean_of_groups(pooled))
