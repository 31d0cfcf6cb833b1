"""FastGen as METHODS states it: Python numbers, one head, query and key at a time."""

from __future__ import annotations

import math

from torch import Tensor


def attention_had(query: Tensor, key: Tensor, groups: int) -> list[float]:
    """What each key ``[n, D]`` is given by the queries ``[G, Q, D]`` of the last Q, on average."""
    had, n, q_len = [0.0] * len(key), len(key), query.shape[1]
    for head in query.double():
        for t in range(q_len):
            last = n - q_len + t
            logits = [float(head[t] @ k) / math.sqrt(len(k)) for k in key[: last + 1].double()]
            most = max(logits)
            weights = [math.exp(logit - most) for logit in logits]
            for i, weight in enumerate(weights):
                had[i] += weight / math.fsum(weights) / groups
    return had


def kept_by(policy: int, had: list[float], kinds: list[int], ranks: list[int], n: int) -> set[int]:
    """Positions in these lists."""
    every, share = range(len(had)), (3 * n) // 10
    kept = {i for i in every if ranks[i] >= n - 2 or kinds[i] == 1}
    if policy >= 1:
        kept |= {i for i in every if kinds[i] == 2}
    if policy >= 2:
        kept |= set(sorted(every, key=lambda i: (had[i], i), reverse=True)[:share])
    if policy >= 3:
        kept |= {i for i in every if ranks[i] >= n - share}
    return set(every) if policy == 4 else kept


def chosen(had: list[float], kinds: list[int], n: int, recovery: float) -> int:
    for policy in range(4):
        kept = kept_by(policy, had, kinds, list(range(n)), n)
        mass = math.fsum(had[i] for i in kept) / n
        # A mass that rounding can take over the edge is no example.
        if abs(mass - recovery) < 1e-4:
            return -1
        if mass > recovery:
            return policy
    return 4
