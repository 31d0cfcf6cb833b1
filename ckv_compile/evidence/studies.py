"""Studies of the method: each is a command, and its results stand in ``docs/results.md``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from . import evaluate
from .asker import Asker
from .candidates import Candidate
from .jsonl import Steps
from .perturbation import BUDGETS, PerturbationReport, perturbation
from .probe import Seen, Watcher
from .study_tables import Line
from .variants import (
    RATIOS,
    calibrated,
    centred,
    largest_of_group,
    norm_first,
    per_head_ratio,
    per_query_head,
    ratio_label,
    relative_epsilon,
    variant,
    window_apart,
    with_sink,
)

# Texts that every installation of Python has. Choices are made on the first, judged on the second.
TUNING = ("topic:execmodel import naming",)
HELD_OUT = ("topic:specialnames", "topic:compound numeric-types", "module:textwrap", "module:ast")
LATER = 32
# Budgets for which alphas are chosen by head, and the questions that judge the choice.
CHOSEN = (0.1, 0.2, 0.4)
ASKED, SAMPLES = ("single", "multikey", "frequent"), 16


def text_of(name: str) -> str:
    """``topic:a b`` are pages of Python's documentation, ``module:a`` a module's source."""
    kind, _, what = name.partition(":")
    if kind == "topic":
        return "\n".join(topics.get(topic, "") for topic in what.split())
    return inspect.getsource(importlib.import_module(what))


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model, traced once, and texts as ids ``[1, tokens]``; what was read is not read again.

    ``seconds`` are those of each measurement so far, also of those that an earlier run has made.
    """

    name: str
    model: Any
    tokenizer: Any
    watcher: Watcher
    tokens: int
    steps: Steps
    # Is told of each text before it is read.
    on_text: Callable[[str], None] = lambda name: None
    seconds: list[float] = dataclasses.field(default_factory=list)

    def ids(self, name: str) -> Tensor:
        found = self.tokenizer(text_of(name), return_tensors="pt").input_ids
        if found.shape[1] < self.tokens:
            raise ValueError(f"{name} has {found.shape[1]} tokens, the study takes {self.tokens}")
        return found[:, : self.tokens].contiguous()

    def measure(
        self, name: str, methods: Sequence[Candidate], later: int, budgets: Sequence[float]
    ) -> PerturbationReport:
        """``later``: queries that no method has seen; 0 for those of the window."""
        self.on_text(f"{name}, {'later' if later else 'window'} queries")

        def compute() -> Line:
            began = time.perf_counter()
            report = perturbation(
                self.model, self.ids(name), budgets, methods,
                queries=LATER, later=later, hidden=later > 0, watcher=self.watcher,
            )  # fmt: skip
            return {"report": report.to_dict(), "seconds": time.perf_counter() - began}

        asked = [[one.label, one.options, one.keeps.__qualname__] for one in methods]
        found = self._once(name, later, list(budgets), asked, compute=compute)
        self.seconds.append(found["seconds"])
        return PerturbationReport.from_dict(found["report"])

    def watched(self, name: str, of: Callable[[Seen], Line]) -> list[Line]:
        """What ``of`` makes of each attention while a text is read."""
        self.on_text(name)

        def compute() -> list[Line]:
            lines: list[Line] = []
            inputs = {"input_ids": self.ids(name), "use_cache": True, "logits_to_keep": 1}
            self.watcher(lambda seen: lines.append(of(seen)), **inputs)
            return lines

        return self._once(name, of.__qualname__, compute=compute)

    def asked(self, methods: tuple[Candidate, ...]) -> Iterator[Line]:
        """Answers to questions about texts of ``tokens``, sample by sample, as plain data."""
        asker = Asker(self.model, self.tokenizer)
        for sample, task in itertools.product(range(SAMPLES), ASKED):
            self.on_text(f"{task}, no. {sample}")
            plan = evaluate.Plan(
                self.name, (task,), (self.tokens,), evaluate.SETTINGS, 1, CHOSEN, methods, sample
            )

            def compute(plan: evaluate.Plan = plan) -> list[Line]:
                return [dataclasses.asdict(answer) for answer in evaluate.run(asker, plan)]

            yield from self._once(task, sample, compute=compute)

    def _once(self, *asked: Any, compute: Callable[[], Any]) -> Any:
        return self.steps.take([self.name, self.tokens, *asked], compute)


def epsilon(bench: Bench) -> Iterator[Line]:
    """Why is the share of heads that CriticalKV moves less far from the paper's 92 %?"""
    pairs = pairs_of_epsilon()
    for part, names in (("tuning", TUNING), ("held-out", HELD_OUT)):
        for later in (0, LATER):
            reports = []
            for name in names:
                reports.append(bench.measure(name, list(pairs), later, BUDGETS))
                where = {"part": part, "text": name, "later": later}
                yield from _shares(reports[-1], pairs, where)
            # Heads by their mean over texts: what one text does by chance cancels.
            where = {"part": part, "text": "mean of all", "later": later}
            yield from _shares(_mean_of(reports), pairs, where)


def _mean_of(reports: Sequence[PerturbationReport]) -> PerturbationReport:
    """One report whose heads are the means of those of several texts."""

    def mean(name: str, rows: Sequence[Any]) -> Any:
        values = [getattr(row, name) for row in rows]
        if isinstance(values[0], tuple):
            return tuple(sum(value) / len(value) for value in zip(*values, strict=True))
        return sum(values) / len(values)

    numbers = ("perturbation", "theta", "sigma_first", "sigma", "group", "layer", "output")
    rows = tuple(
        dataclasses.replace(same[0], **{name: mean(name, same) for name in numbers})
        for same in zip(*(report.rows for report in reports), strict=True)
    )
    hidden = tuple(
        dataclasses.replace(same[0], distance=mean("distance", same))
        for same in zip(*(report.hidden for report in reports), strict=True)
    )
    return dataclasses.replace(reports[0], rows=rows, hidden=hidden)


def pairs_of_epsilon() -> dict[Candidate, Candidate]:
    """Variants of CriticalKV, each with the attention-only selection that it is compared with."""
    snap = variant("snapkv", method="snapkv")
    plain = variant("snapkv, no pooling", method="snapkv", kernel_size=1)
    sink = variant("snapkv, sink kept", with_sink, method="snapkv")
    found = {snap: snap, plain: plain, sink: sink}
    for one in (
        variant("criticalkv"),
        variant("eps 0", epsilon=0.0),
        variant("eps 0.01/K", relative_epsilon(0.01)),
        variant("eps 0.1/K", relative_epsilon(0.1)),
        variant("l2", norm="l2"),
        variant("per query head, eps 0", per_query_head, epsilon=0.0),
        variant("largest of group, eps 0", largest_of_group, epsilon=0.0),
        variant("centred, eps 0", centred, epsilon=0.0),
    ):
        found[one] = snap
    for one in (
        variant("no pooling", kernel_size=1),
        variant("no pooling, eps 0", kernel_size=1, epsilon=0.0),
        variant("no pooling, per query head, eps 0", per_query_head, kernel_size=1, epsilon=0.0),
        variant("no pooling, centred, eps 0", centred, kernel_size=1, epsilon=0.0),
    ):
        found[one] = plain
    found[variant("sink kept, eps 0", with_sink, epsilon=0.0)] = sink
    return found


def _shares(
    report: PerturbationReport, pairs: dict[Candidate, Candidate], where: Line
) -> Iterator[Line]:
    """Counts of heads, and means, of each variant at each budget."""
    means = {(row["method"], row["budget"]): row for row in report.summary()}
    for budget in report.budgets:
        for one, than in pairs.items():
            line: Line = {**where, "budget": budget, "method": one.label, "than": than.label}
            for what in ("perturbation", "theta", "group"):
                better, heads = report.share_better(one.label, than.label, budget, what)
                line |= {f"better_{what}": better, f"heads_{what}": heads}
            numbers = means[one.label, budget]
            wanted = ("kept", "perturbation", "theta", "tightness", "sigma_first", "sigma")
            yield line | {name: numbers[name] for name in (*wanted, "layer", "hidden")}


def stages(bench: Bench) -> Iterator[Line]:
    """Alpha, for all heads or for each, and the window; L1 against L2 is in ``epsilon``."""
    ratios = [variant(ratio_label(ratio), first_stage_ratio=ratio) for ratio in RATIOS]
    windows: list[Candidate] = []
    for size in (8, 16, 32, 64):
        windows += [
            variant(f"snapkv, window {size}", method="snapkv", window_size=size),
            variant(f"criticalkv, window {size}", window_size=size),
        ]
    by_head = yield from _by_head(bench, ratios)
    apart = [
        variant("window apart", window_apart),
        variant("window apart, eps 0", window_apart, epsilon=0.0),
    ]
    methods = [*ratios, by_head, *apart, *windows]
    snap = {one: methods[RATIOS.index(1.0)] for one in methods}
    for i, one in enumerate(windows):
        snap[one] = windows[i - i % 2]
    for name in HELD_OUT:
        report = bench.measure(name, methods, LATER, (0.05, 0.1, 0.2, 0.4))
        yield from _shares(report, snap, {"part": "held-out", "text": name, "later": LATER})


def heads(bench: Bench) -> Iterator[Line]:
    """Whether alphas by head, which lower perturbation on held-out texts, answer better."""
    ratios = [variant(ratio_label(ratio), first_stage_ratio=ratio) for ratio in RATIOS]
    by_head = yield from _by_head(bench, ratios)
    snap, critical = variant("snapkv", method="snapkv"), variant("criticalkv")
    yield from bench.asked((snap, critical, ratios[RATIOS.index(0.75)], by_head))


def _by_head(bench: Bench, ratios: Sequence[Candidate]) -> Generator[Line, None, Candidate]:
    """An alpha for each head at each budget, chosen on a text; lines that say which."""
    chosen = {}
    for budget in CHOSEN:
        chosen[budget] = calibrated(bench.measure(TUNING[0], ratios, LATER, (budget,)), budget)
    seconds = sum(bench.seconds)
    for budget, by_site in chosen.items():
        counts = dict.fromkeys(RATIOS, 0)
        for ratio in (ratio for row in by_site.values() for ratio in row):
            counts[ratio] += 1
        yield {"calibration": TUNING[0], "budget": budget, "heads": counts, "seconds": seconds}

    def per_head(seen: Seen, config: Any, budget: int) -> Tensor:
        # A smaller budget than any on the tuning text takes the choice for the smallest.
        share = max(config.budget.spec, min(chosen))
        return per_head_ratio(chosen[share])(seen, config, budget)

    return variant("alpha by head", per_head)


def pooling(bench: Bench) -> Iterator[Line]:
    """Whether to multiply before pooling or after, and to count the window in stage 1 or not."""
    snap = variant("snapkv", method="snapkv")
    pairs = {snap: snap}
    for one in (
        variant("criticalkv"),
        variant("norm first", norm_first),
        variant("norm first, eps 0", norm_first, epsilon=0.0),
        variant("window apart", window_apart),
        variant("norm first, window apart, eps 0", _both, epsilon=0.0),
    ):
        pairs[one] = snap
    for part, names in (("tuning", TUNING), ("held-out", HELD_OUT)):
        for name in names:
            report = bench.measure(name, list(pairs), LATER, BUDGETS)
            yield from _shares(report, pairs, {"part": part, "text": name, "later": LATER})


def _both(seen: Seen, config: Any, budget: int) -> Tensor:
    window = min(config.window_size, budget)
    ratio = (window + config.first_stage_ratio * (budget - window)) / budget
    return norm_first(seen, dataclasses.replace(config, first_stage_ratio=min(ratio, 1)), budget)


def norms(bench: Bench) -> Iterator[Line]:
    """Rank correlation of L1 and L2 norms on real values; what there is to rank at all."""
    for name in (*TUNING, *HELD_OUT):
        for line in bench.watched(name, _norm_numbers):
            yield {"text": name, **line}


def _norm_numbers(seen: Seen) -> Line:
    """Of each KV head: correlations of norms, how much they vary, how small attention is."""
    config = variant("").config
    by_name = {}
    for norm in ("l1", "l2", "value"):
        inputs = dataclasses.replace(seen.inputs, config=dataclasses.replace(config, norm=norm))
        by_name[norm] = inputs.projected_norm()[0]  # [Hkv, K]
    plain = dataclasses.replace(config, kernel_size=1)
    attention = dataclasses.replace(seen.inputs, config=plain).window_attention()[0]
    prefix = attention[:, : -config.window_size]
    l1 = by_name["l1"][:, 4:]  # without the sink
    return {
        "site": seen.name,
        "spearman_l1_l2": _spearman(by_name["l1"], by_name["l2"]),
        "spearman_l1_value": _spearman(by_name["l1"], by_name["value"]),
        "norm_variation": (l1.std(-1) / l1.mean(-1)).tolist(),
        "attention_below_1e-4": (prefix < 1e-4).float().mean(-1).tolist(),
        "attention_variation": (prefix[:, 4:].std(-1) / prefix[:, 4:].mean(-1)).tolist(),
        "sink": attention[:, :4].sum(-1).tolist(),
    }


def _spearman(a: Tensor, b: Tensor) -> list[float]:
    """Rank correlation of the rows of two ``[Hkv, K]``."""
    ranks = [x.argsort(-1).argsort(-1).float() for x in (a, b)]
    ranks = [x - x.mean(-1, keepdim=True) for x in ranks]
    product = (ranks[0] * ranks[1]).sum(-1)
    return (product / (ranks[0].norm(dim=-1) * ranks[1].norm(dim=-1))).tolist()


STUDIES: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "epsilon": epsilon,
    "stages": stages,
    "heads": heads,
    "pooling": pooling,
    "norms": norms,
}
# How often each of them reads a text.
_READS = {
    "epsilon": 2 * (len(TUNING) + len(HELD_OUT)),
    "stages": len(CHOSEN) + len(HELD_OUT),
    "heads": len(CHOSEN) + len(ASKED) * SAMPLES,
    "pooling": len(TUNING) + len(HELD_OUT),
    "norms": len(TUNING) + len(HELD_OUT),
}


def run(
    name: str,
    model: Any,
    tokenizer: Any,
    tokens: int,
    results: Path,
    *,
    model_name: str = "",
    on_text: Callable[[int, int, str], None] | None = None,
) -> int:
    """Write the lines of a study to ``results`` (JSON lines), anew; returns their number.

    Beside them lies a file of what has been measured, until all of it is: after an interruption the
    same call goes on from there.

    Args:
        tokens: of each text.
        model_name: whose measurements those are.
        on_text: is called with the number of the text that is read, how many there are, its name.
    """
    texts = itertools.count()

    def step(text: str) -> None:
        if on_text is not None:
            on_text(next(texts), _READS[name], text)

    results.parent.mkdir(parents=True, exist_ok=True)
    steps = Steps(results.with_name(f"{results.name}.steps"))
    who = f"{name} of {model_name}"
    bench = Bench(who, model, tokenizer, Watcher(model), tokens, steps, step)
    number = 0
    with results.open("w", encoding="utf-8") as file, torch.no_grad():
        for line in STUDIES[name](bench):
            file.write(json.dumps(line) + "\n")
            file.flush()
            number += 1
    steps.finish()
    return number
