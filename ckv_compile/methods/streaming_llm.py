"""StreamingLLM (arXiv 2309.17453): the first tokens and the last."""

from __future__ import annotations

import torch

from .base import ScoreInputs, Scores

N_SINK = 4


def streaming_llm(inputs: ScoreInputs) -> Scores:
    """4 sinks, the row's first tokens, and then the most recent: neither K nor V is read.

    The score is the token's rank in its row, so it is no base of CriticalKV's.
    """
    if inputs.real is None:
        ranks = torch.arange(inputs.key.shape[2], device=inputs.key.device)[None]
    else:
        ranks = inputs.real.cumsum(-1) - 1  # [B, K]
    # Ranks are exact in float32 up to 2^24; the sinks lie above, the first one highest.
    scores = torch.where(ranks < N_SINK, 2**25 - 4 * ranks, ranks).float()
    return Scores(scores[:, None].expand(inputs.key.shape[:3]))
