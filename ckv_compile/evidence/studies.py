"""Studies of the method: each is a command, and its results stand in ``docs/results.md``."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from .candidates import Candidate
from .perturbation import BUDGETS, PerturbationReport, perturbation
from .probe import Seen, Watcher
from .variants import (
    RATIOS,
    calibrated,
    centred,
    largest_of_group,
    per_head_ratio,
    per_query_head,
    ratio_label,
    relative_epsilon,
    variant,
    with_sink,
)

# Texts that every installation of Python has. Choices are made on the first, judged on the second.
TUNING = ("topic:execmodel import naming", "module:argparse")
HELD_OUT = ("topic:specialnames", "topic:compound numeric-types", "module:textwrap", "module:ast")
LATER = 32

# A line of a study's results.
Line = dict[str, Any]


def text_of(name: str) -> str:
    """``topic:a b`` are pages of Python's documentation, ``module:a`` a module's source."""
    kind, _, what = name.partition(":")
    if kind == "topic":
        return "\n".join(topics.get(topic, "") for topic in what.split())
    return inspect.getsource(importlib.import_module(what))


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model, traced once, and texts as ids ``[1, tokens]``."""

    model: Any
    tokenizer: Any
    watcher: Watcher
    tokens: int

    def ids(self, name: str) -> Tensor:
        found = self.tokenizer(text_of(name), return_tensors="pt").input_ids
        if found.shape[1] < self.tokens:
            raise ValueError(f"{name} has {found.shape[1]} tokens, the study takes {self.tokens}")
        return found[:, : self.tokens].contiguous()

    def measure(
        self, name: str, methods: Sequence[Candidate], later: int, budgets: Sequence[float]
    ) -> PerturbationReport:
        """``later``: queries that no method has seen; 0 for those of the window."""
        return perturbation(
            self.model, self.ids(name), budgets, methods,
            queries=LATER, later=later, hidden=True, watcher=self.watcher,
        )  # fmt: skip


def epsilon(bench: Bench) -> Iterator[Line]:
    """Why is the share of heads that CriticalKV moves less far from the paper's 92 %?"""
    pairs = _pairs()
    for part, names in (("tuning", TUNING), ("held-out", HELD_OUT)):
        for name in names:
            for later in (0, LATER):
                report = bench.measure(name, list(pairs), later, BUDGETS)
                yield from _shares(report, pairs, {"part": part, "text": name, "later": later})


def _pairs() -> dict[Candidate, Candidate]:
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
    began = time.perf_counter()
    chosen = {}
    for budget in (0.1, 0.2, 0.4):
        found = bench.measure(TUNING[0], ratios, LATER, (budget,))
        chosen[budget] = calibrated(found, budget)
    seconds = time.perf_counter() - began
    for budget, by_site in chosen.items():
        counts = {ratio: 0 for ratio in RATIOS}
        for ratio in (ratio for row in by_site.values() for ratio in row):
            counts[ratio] += 1
        yield {"calibration": TUNING[0], "budget": budget, "heads": counts, "seconds": seconds}

    def per_head(seen: Seen, config: Any, budget: int) -> Tensor:
        share = config.budget.spec
        return per_head_ratio(chosen[share])(seen, config, budget)

    methods = [*ratios, variant("alpha by head", per_head), *windows]
    snap = {one: methods[RATIOS.index(1.0)] for one in methods}
    for i, one in enumerate(windows):
        snap[one] = windows[i - i % 2]
    for name in HELD_OUT:
        report = bench.measure(name, methods, LATER, (0.1, 0.2, 0.4))
        yield from _shares(report, snap, {"part": "held-out", "text": name, "later": LATER})


def norms(bench: Bench) -> Iterator[Line]:
    """Rank correlation of L1 and L2 norms on real values; what there is to rank at all."""
    for name in (*TUNING, *HELD_OUT):
        lines: list[Line] = []

        def visit(seen: Seen, lines: list[Line] = lines, name: str = name) -> None:
            lines.append({"text": name, "site": seen.name, **_norm_numbers(seen)})

        bench.watcher(visit, input_ids=bench.ids(name), use_cache=True, logits_to_keep=1)
        yield from lines


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
    "norms": norms,
}


def run(name: str, model: Any, tokenizer: Any, tokens: int, results: Path) -> int:
    """Write the lines of a study to ``results`` (JSON lines), anew; returns their number."""
    bench = Bench(model, tokenizer, Watcher(model), tokens)
    results.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    with results.open("w", encoding="utf-8") as file, torch.no_grad():
        for line in STUDIES[name](bench):
            file.write(json.dumps(line) + "\n")
            file.flush()
            number += 1
    return number
