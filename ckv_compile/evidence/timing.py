"""What a budget buys: seconds to the first token, per token, and bytes of cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..api import optimize, restore
from ..sizes import TAIL
from .caches import fresh_cache
from .candidates import Candidate, Spec


@dataclasses.dataclass(frozen=True)
class Timing:
    """One budget; ``method`` "full" is the model as written. Times are the best of all repeats.

    ``kept`` entries per KV head, the mean of all where heads compete. ``bytes_by_token``: storage
    of the cache after the prompt and after each token.
    """

    method: str
    budget: Spec
    tokens: int
    kept: int
    prefill_s: float
    per_token_s: float
    cache_bytes: int
    first_call_s: float
    bytes_by_token: tuple[int, ...] = ()
    allocation: str = ""


@torch.no_grad()
def timings(
    model: Any,
    input_ids: Tensor,
    budgets: Sequence[Spec],
    candidate: Candidate,
    *,
    lowering: str = "auto",
    new_tokens: int = 8,
    repeats: int = 3,
    full: bool = True,
    on_step: Callable[[int, int, str], None] | None = None,
) -> Iterator[Timing]:
    """The model as it is, if ``full``, and at each budget; in the end it is as it was.

    Args:
        input_ids: ``[B, n]``, a prompt.
        candidate: the method; all budgets run what is compiled for the first one.
        lowering: as :func:`ckv_compile.optimize` takes it; "auto" compiles for minutes.
    """
    options = {**vars(candidate.without_policies().config), "lowering": lowering}
    del options["budget"]
    steps: list[Spec | None] = [*([None] if full else []), *budgets]
    allocation = candidate.config.allocation
    try:
        for number, budget in enumerate(steps):
            if on_step is not None:
                at = "full cache" if budget is None else f"{allocation}, budget {budget}"
                on_step(number, len(steps), at)
            restore(model) if budget is None else optimize(model, budget, **options)
            first = time.perf_counter()
            _run(model, input_ids, 2)
            first = time.perf_counter() - first
            runs = [_run(model, input_ids, new_tokens) for _ in range(repeats)]
            sizes, kept = runs[-1][2:]
            yield Timing(
                "full" if budget is None else candidate.label,
                1.0 if budget is None else budget,
                input_ids.shape[1],
                kept,
                min(run[0] for run in runs),
                min(run[1] for run in runs),
                sizes[0],
                first,
                tuple(sizes),
                "" if budget is None else allocation,
            )
    finally:
        restore(model)


def _run(model: Any, ids: Tensor, steps: int) -> tuple[float, float, list[int], int]:
    """Seconds of the prompt and of a token, bytes of cache by token, entries after the prompt."""
    cache = fresh_cache(model)
    start = time.perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefill = time.perf_counter() - start
    kept = _kept(cache)
    sizes, seconds = [cache.nbytes], 0.0
    for _ in range(steps):
        token = logits[:, -1].argmax(-1, keepdim=True)
        start = time.perf_counter()
        logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits
        seconds += time.perf_counter() - start
        sizes.append(cache.nbytes)
    return prefill, seconds / steps, sizes, kept


def _kept(cache: Any) -> int:
    """Entries per KV head behind the prompt: of the fullest layer, or the mean of packed ones."""
    packed = [layer.packed for layer in cache.layers if getattr(layer, "packed", None) is not None]
    if not packed:
        return max(layer.keys.shape[2] for layer in cache.layers)
    counts = torch.cat([one.lengths for one in packed])
    return round(TAIL + float(counts.sum()) / len(counts))
