"""Which questions to ask over which caches, and a file of answers that an interruption spares."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .asker import CONTEXT_ONLY, REGULAR, Asker, Cache
from .candidates import Candidate, Spec
from .jsonl import append_lines, read_lines
from .tasks import TASKS, sample_of

SETTINGS = (REGULAR, CONTEXT_ONLY)
# The full cache answers alike, whenever the question came.
FULL, BOTH = "full", "both"


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer over one cache; a line of the results file.

    ``kept`` entries per KV head of ``tokens``, and their bytes; 0 in files of older versions.
    ``options`` are those of the method. ``loss``: nats per token of a right answer.
    """

    model: str
    task: str
    length: int
    sample: int
    setting: str
    method: str
    options: str
    budget: Spec
    tokens: int
    kept: int
    score: float
    loss: float
    answer: str
    expected: tuple[str, ...]
    cache_bytes: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What need not be asked twice."""
        asked = (self.model, self.task, self.length, self.sample)
        return (*asked, self.setting, self.method, self.options, str(self.budget))

    @property
    def allocation(self) -> str:
        """As ``options`` name it; "" of the full cache."""
        options = dict(one.split("=", 1) for one in self.options.split(", ") if "=" in one)
        return options.get("allocation", "")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to ask: every combination of the fields, the same samples over every cache."""

    model: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    settings: tuple[str, ...]
    samples: int
    budgets: tuple[Spec, ...]
    candidates: tuple[Candidate, ...]
    first_sample: int = 0

    def __post_init__(self) -> None:
        known = {"tasks": tuple(TASKS), "settings": SETTINGS}
        for name, names in known.items():
            for value in getattr(self, name):
                if value not in names:
                    raise ValueError(f"{name}: {value!r} is unknown; it takes {', '.join(names)}")
        for name, least in (("samples", 1), ("first_sample", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}; it takes at least {least}")
        for one in self.candidates:
            for budget in self.budgets:
                one.at(budget)  # says what is wrong with it

    def asked(self) -> Iterator[tuple[str, int, int]]:
        """Task, length, sample; an interrupted run has something of each task."""
        samples = range(self.first_sample, self.first_sample + self.samples)
        for sample, length, task in itertools.product(samples, self.lengths, self.tasks):
            yield task, length, sample

    def caches(self, setting: str) -> Iterator[Cache]:
        """Over what to answer; the full cache in the first setting alone."""
        if setting == self.settings[0]:
            yield 1.0, None
        free = [one for one in self.candidates if one.own_budget is None]
        yield from itertools.product(self.budgets, free)
        yield from ((one.own_budget, one) for one in self.candidates if one.own_budget is not None)

    def key(self, asked: tuple[str, int, int], setting: str, cache: Cache) -> tuple[Any, ...]:
        """``Answer.key`` of the answer over this cache."""
        budget, one = cache
        if one is None:
            return (self.model, *asked, BOTH, FULL, "", str(budget))
        return (self.model, *asked, setting, one.label, one.options, str(budget))

    def every_key(self) -> Iterator[tuple[Any, ...]]:
        """``Answer.key`` of all its answers, in the order in which they are asked."""
        for asked, setting in itertools.product(self.asked(), self.settings):
            yield from (self.key(asked, setting, cache) for cache in self.caches(setting))


OnSample = Callable[[int, int, str], None]


def run(
    asker: Asker, plan: Plan, results: Path | None = None, *, on_sample: OnSample | None = None
) -> list[Answer]:
    """Ask what ``results`` (JSON lines) does not have yet, and extend it sample by sample.

    Args:
        on_sample: is called before each sample with its number, how many there are and its name.

    Returns:
        All answers of the plan, old and new, in its order.
    """
    answers = {answer.key: answer for answer in read(results)}
    todo = list(plan.asked())
    for number, asked in enumerate(todo):
        if on_sample is not None:
            on_sample(number, len(todo), f"{asked[0]}, {asked[1]:,} tokens, no. {asked[2]}")
        new = _ask(asker, plan, asked, set(answers))
        answers |= {answer.key: answer for answer in new}
        if new and results is not None:
            append_lines(results, map(dataclasses.asdict, new))
    return [answers[key] for key in plan.every_key()]


def held(plan: Plan, results: Path | None) -> list[Answer]:
    """Those of the plan's answers that ``results`` has by now."""
    answers = {answer.key: answer for answer in read(results)}
    return [answers[key] for key in plan.every_key() if key in answers]


def _ask(
    asker: Asker, plan: Plan, asked: tuple[str, int, int], done: set[tuple[Any, ...]]
) -> list[Answer]:
    """The answers to one sample that are not ``done``."""
    task, length, index = asked
    sample, prompt = sample_of(task, asker.tokenizer, length, index)
    new = []
    for setting in plan.settings:
        caches = [c for c in plan.caches(setting) if plan.key(asked, setting, c) not in done]
        if not caches:
            continue
        most = TASKS[task].max_new_tokens
        for reply in asker.answers(prompt, setting, caches, most):
            where, label, options = plan.key(asked, setting, reply.cache)[4:7]
            new.append(Answer(
                plan.model, task, length, index, where, label, options, reply.cache[0],
                prompt.tokens, reply.kept, sample.score(reply.text), reply.loss, reply.text,
                sample.answers, reply.cache_bytes,
            ))  # fmt: skip
    return new


def read(results: Path | None) -> list[Answer]:
    """The answers in a file."""
    return [answer_of(line) for line in read_lines(results)]


def answer_of(line: Mapping[str, Any]) -> Answer:
    """From plain data."""
    return Answer(**{**line, "expected": tuple(line["expected"])})


def told(results: Path) -> list[Answer]:
    """The same for a table, which knows methods by their labels alone.

    Raises:
        ValueError: there are none; or a label stands for different options, or models.
    """
    answers = read(results)
    if not answers:
        raise ValueError(f"{results} holds no answers")
    known: dict[str, tuple[str, str]] = {}
    for answer in answers:
        meant = (answer.model, answer.options)
        if known.setdefault(answer.method, meant) != meant:
            raise ValueError(f"{results} has {answer.method!r} with different options or models")
    return answers
