"""Expected Attention (arXiv 2510.00636): what queries still to come would look at."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import ScoreInputs, Scores


def expected_attention(inputs: ScoreInputs) -> Scores:
    """``softmax_i(mu^T k_i / sqrt(d) + k_i^T Sigma k_i / (2 d)) * ||v_i||_2``, mean over the group.

    The logarithm of the mean of ``exp(q^T k_i / sqrt(d))`` over queries with that mean and
    covariance, were they normal. ``mu`` and ``Sigma``, of each query head, are those of the
    prompt's queries before their rotary embedding, turned by the mean rotation of the next 512
    positions; ``1 / sqrt(d)`` is the model's own scale. The softmax is over all of a row's tokens,
    every real query counts, and the covariance is divided by their number: these are our choices.

    Of a later piece of a prompt, its own queries say what will be asked.
    """
    query, seen = inputs.expected_query().float(), inputs.real
    q_len, kv_len = query.shape[2], inputs.key.shape[2]
    if seen is None:
        count: Tensor | int = q_len
        mean = query.mean(2, keepdim=True)
        centred = query - mean
    else:
        asks = seen.narrow(1, kv_len - q_len, q_len)[:, None, :, None]
        count = asks.sum(2, keepdim=True).clamp(min=1)
        mean = (query * asks).sum(2, keepdim=True) / count
        centred = (query - mean) * asks
    spread = centred.mT @ centred / count  # [B, H, D, D]
    scale = inputs.query.shape[3] ** -0.5 if inputs.scale is None else inputs.scale
    keys = inputs.key.float()
    logits = []
    # One member of each group at a time: the products are as large as the keys.
    groups = zip(inputs.groups_of(mean).unbind(2), inputs.groups_of(spread).unbind(2), strict=True)
    for mu, sigma in groups:
        linear, square = (keys * mu).sum(-1), ((keys @ sigma) * keys).sum(-1)
        logits.append(linear * scale + square * (scale * scale / 2))
    stacked = torch.stack(logits, 2)  # [B, Hkv, G, K]
    if seen is not None:
        stacked = stacked.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    size = torch.linalg.vector_norm(inputs.value.float(), dim=-1)
    return Scores(stacked.softmax(-1).mean(2) * size)
