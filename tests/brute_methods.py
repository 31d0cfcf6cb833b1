"""Base scores of every method as METHODS states them: NumPy, float64, one query and key at a time.

One sequence, without pads: ``q [H, n, D]``, ``k`` and ``v [Hkv, n, D]``, ``w [E, H*D]``; ``window``
queries observe and ``width`` keys are pooled. Each returns ``[Hkv, n]``; what it says of the window
is not read. Written without a look at the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from brute_force import Array, attention_row, projected_norm, select
from numpy.typing import NDArray


def attention(q: Array, k: Array, h: int, t: int) -> Array:
    """Row ``t`` of head ``h``, causal."""
    return attention_row(q[h, t], k[h // (len(q) // len(k))], q.shape[2] ** -0.5, t, None)


def over_groups(q: Array, k: Array, score: Callable[[int], Array]) -> Array:
    """Mean of ``score(h)`` over the query heads of each KV head."""
    groups = len(q) // len(k)
    return np.array(
        [sum(score(g * groups + m) for m in range(groups)) / groups for g in range(len(k))]
    )


def window_rows(q: Array, k: Array, h: int, window: int) -> list[Array]:
    return [attention(q, k, h, t) for t in range(q.shape[1] - window, q.shape[1])]


def pooled(row: Array, width: int, pool: Callable[[list[float]], float]) -> Array:
    """``pool`` of the neighbours that exist."""
    near = range(-(width // 2), width // 2 + 1)
    n = len(row)
    return np.array([pool([row[i + j] for j in near if 0 <= i + j < n]) for i in range(n)])


def with_window(prefix: Array, n: int) -> Array:
    return np.concatenate([prefix, np.zeros(n - len(prefix))])


def snapkv(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    n = q.shape[1]

    def score(h: int) -> Array:
        mean = sum(window_rows(q, k, h, window)) / window
        return with_window(pooled(mean[: n - window], width, max), n)

    return over_groups(q, k, score)


def h2o(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    n = q.shape[1]

    def score(h: int) -> Array:
        rows = [attention(q, k, h, t) for t in range(n)]
        return np.array([sum(rows[t][i] for t in range(i, n)) / (n - i) for i in range(n)])

    return over_groups(q, k, score)


def tova(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    mean = sum(attention(q, k, h, q.shape[1] - 1) for h in range(len(q))) / len(q)
    return np.array([mean] * len(k))


def streaming_llm(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    n = q.shape[1]
    return np.array([[3 * n - i if i < 4 else i for i in range(n)]] * len(k), dtype=np.float64)


def knorm(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    return np.array([[-math.sqrt(sum(x * x for x in key)) for key in head] for head in k])


def keydiff(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    scores = []
    for head in k:
        mean = sum(key / np.linalg.norm(key) for key in head) / len(head)
        size = np.linalg.norm(mean)
        scores.append([-float(key @ mean) / (np.linalg.norm(key) * size) for key in head])
    return np.array(scores)


def vatp(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    def score(h: int) -> Array:
        mean = sum(window_rows(q, k, h, window)) / window
        return mean * np.abs(v[h // (len(q) // len(k))]).sum(-1)

    return over_groups(q, k, score)


def caote(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    """By its meaning: the output is made again without the entry, and the change measured."""
    n = q.shape[1]

    def score(h: int) -> Array:
        value, change = v[h // (len(q) // len(k))], np.zeros(n)
        for row in window_rows(q, k, h, window):
            output = row @ value
            for i in range(n - window):
                rest = row.copy()
                rest[i] = 0
                change[i] += np.linalg.norm(output - rest @ value / rest.sum()) / window
        return change

    return over_groups(q, k, score)


def projected(q: Array, k: Array, v: Array, w: Array, h: int, order: int) -> Array:
    """``||v_i W_O^h||``, ``[n]``."""
    d = v.shape[2]
    head = v[h // (len(q) // len(k))]
    return np.array([np.linalg.norm(w[:, h * d : (h + 1) * d] @ value, order) for value in head])


def laprox(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    n = q.shape[1]

    def score(h: int) -> Array:
        column = np.sqrt(sum(row**2 for row in window_rows(q, k, h, window)))
        product = column * projected(q, k, v, w, h, 2)
        return with_window(pooled(product[: n - window], width, np.mean), n)

    return over_groups(q, k, score)


def defensive(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    n, groups = q.shape[1], len(q) // len(k)
    prefix, risk = n - window, np.zeros((len(k), n))
    for h in range(len(q)):
        for row in window_rows(q, k, h, window):
            smooth = pooled(row[:prefix], 5, lambda near: sum(near) / 5)
            smooth = smooth * row[:prefix].sum() / smooth.sum()
            risk[h // groups, :prefix] = np.maximum(risk[h // groups, :prefix], smooth)
    for head in risk:
        head[:prefix] = np.maximum(head[:prefix], head[:prefix].mean())
    norm = over_groups(q, k, lambda h: projected(q, k, v, w, h, 1))
    scores = risk * norm / norm.sum(0)
    mean = over_groups(q, k, lambda h: sum(window_rows(q, k, h, window)) / window)[:, :prefix]
    highest = scores.max()
    for head, attention in zip(scores, mean, strict=True):
        carried, left = 0.0, list(range(prefix))
        while left and carried < 0.9 * attention.sum():
            most = max(left, key=lambda i: (attention[i], i))
            left.remove(most)
            carried += attention[most]
            head[most] = highest * (1 + attention[most])
    return scores


def expected_attention(q: Array, k: Array, v: Array, w: Array, window: int, width: int) -> Array:
    """As if a model's mean rotation turned the head's axes around: no rotation is known here."""
    return expected_scores(q[..., ::-1], k, v, q.shape[2] ** -0.5)


def expected_scores(turned: Array, k: Array, v: Array, scale: float) -> Array:
    """Of queries ``[H, n, D]`` under the mean rotation of the positions to come."""
    groups, sizes = len(turned) // len(k), np.sqrt((v**2).sum(-1))

    def score(h: int) -> Array:
        mu, n = sum(turned[h]) / turned.shape[1], turned.shape[1]
        sigma = sum(np.outer(x - mu, x - mu) for x in turned[h]) / n
        keys = k[h // groups]
        logits = [scale * (mu @ key) + scale**2 / 2 * (key @ sigma @ key) for key in keys]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        return np.array(weights) / math.fsum(weights) * sizes[h // groups]

    return over_groups(turned, k, score)


SCORES = {
    "snapkv": snapkv,
    "h2o": h2o,
    "tova": tova,
    "streaming_llm": streaming_llm,
    "knorm": knorm,
    "keydiff": keydiff,
    "vatp": vatp,
    "caote": caote,
    "defensive": defensive,
    "laprox": laprox,
    "expected_attention": expected_attention,
}


def kept_positions(
    method: str,
    base: str,
    q: Array,
    k: Array,
    v: Array,
    w: Array,
    window: int,
    width: int,
    budget: int,
    first_stage_ratio: float,
    epsilon: float,
) -> NDArray[np.int64]:
    """What of a prompt stays, ``[Hkv, budget]``; ``base`` counts for "criticalkv" alone."""
    norm = None
    if method == "criticalkv":
        method = base
        norm = projected_norm(v[None], w, False, len(q), "l1")
    scores = SCORES[method](q, k, v, w, window, width)[None]
    return select(scores, norm, budget, window, first_stage_ratio, epsilon)[0]
