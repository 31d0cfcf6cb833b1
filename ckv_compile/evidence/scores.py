"""Means of answers, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .candidates import Spec
from .evaluate import BOTH, Answer


def wilson(successes: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927).

    ``successes`` may be a sum of partial scores: these vary less than zeros and ones do, and the
    interval is then too wide, never too narrow.
    """
    if not trials:
        return 0.0, 1.0
    share, square = successes / trials, z * z / trials
    centre = share + square / 2
    half = z * math.sqrt(max(share * (1 - share), 0.0) / trials + square / (4 * trials))
    low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    return max(low, 0.0), min(high, 1.0)


@dataclasses.dataclass(frozen=True)
class Score:
    """The mean of one method at one budget over ``samples`` answers, and its interval.

    ``better``, ``worse``: on how many samples it does better or worse than the first method of the
    same setting and budget; ``lower_loss``: on how many it finds the right answer more likely.
    ``loss`` is the mean, in nats per token; so is ``cache_bytes``, 0 where nobody counted.
    """

    task: str
    length: int
    setting: str
    budget: Spec
    method: str
    samples: int
    mean: float
    low: float
    high: float
    loss: float
    better: int = 0
    worse: int = 0
    lower_loss: int = 0
    cache_bytes: float = 0.0
    allocation: str = ""


def scores(answers: Sequence[Answer], *, over_tasks: bool = False) -> list[Score]:
    """Means by task, length, setting, budget and method; over all tasks in one, if asked.

    The full cache's answers come first, under the setting "both".
    """
    groups: dict[tuple[Any, ...], dict[Any, Answer]] = {}
    budgets = {str(a.budget): a.budget for a in answers}
    for a in sorted(answers, key=lambda a: a.setting != BOTH):
        task = "all" if over_tasks else a.task
        group = groups.setdefault((task, a.length, a.setting, str(a.budget), a.method), {})
        group[a.task, a.sample] = a
    found: list[Score] = []
    firsts: dict[tuple[Any, ...], dict[Any, Answer]] = {}
    for (task, length, setting, budget, method), group in groups.items():
        where = (task, length, setting)
        first = firsts.setdefault((*where, budget), group)
        shared = [key for key in group if key in first]
        pairs = [(group[key], first[key]) for key in shared]
        total, count = sum(a.score for a in group.values()), len(group)
        low, high = wilson(total, count)
        found.append(Score(
            *where, budgets[budget], method, count, total / count, low, high,
            loss=sum(a.loss for a in group.values()) / count,
            better=sum(a.score > b.score for a, b in pairs),
            worse=sum(a.score < b.score for a, b in pairs),
            lower_loss=sum(a.loss < b.loss for a, b in pairs),
            cache_bytes=sum(a.cache_bytes for a in group.values()) / count,
            allocation=next(iter(group.values())).allocation,
        ))  # fmt: skip
    return found
