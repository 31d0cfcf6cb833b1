"""The results of a study as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import evaluate
from .jsonl import read_lines
from .scores import scores
from .text import score_table, table

# A line of a study's results.
Line = dict[str, Any]


def told(name: str, results: Path, *, markdown: bool = False) -> str:
    """The results of a study as tables."""
    lines = read_lines(results)
    if name == "norms":
        return table(_norms_told(lines), markdown=markdown)
    compared = [line for line in lines if "than" in line]
    found = [line for line in lines if "calibration" in line]
    parts = [
        f"{line['budget']:g}: alpha of {line['heads']} KV heads on {line['calibration']}"
        for line in found
    ]
    if found:
        parts.append(f"{found[0]['seconds']:.0f} s in all")
    answers = [evaluate.answer_of(line) for line in lines if "answer" in line]
    if answers:
        told_of = scores(answers, over_tasks=True) + scores(answers)
        parts.append(f"\n{score_table(told_of, markdown=markdown)}")
    for later in sorted({line["later"] for line in compared}):
        for part in dict.fromkeys(line["part"] for line in compared):
            here = [one for one in compared if (one["later"], one["part"]) == (later, part)]
            if here:
                seen = "queries not seen" if later else "queries of the window"
                parts += [f"\n{part} texts, {seen}:\n", table(_told(here), markdown=markdown)]
    return "\n".join(parts)


def _told(lines: Sequence[Line]) -> list[Line]:
    """One row for each method and budget, over texts; ratios to what it is compared with."""
    found = []
    single = [line for line in lines if line["text"] != "mean of all"]
    means = {(o["budget"], o["method"]): o for o in lines if o["text"] == "mean of all"}
    for budget, method in dict.fromkeys((one["budget"], one["method"]) for one in single):
        mine = [one for one in single if (one["budget"], one["method"]) == (budget, method)]
        than = mine[0]["than"]
        if method == than:
            continue
        other = [one for one in single if (one["budget"], one["method"]) == (budget, than)]
        row: Line = {"budget": budget, "method": method, "than": than}
        for what, name in (("perturbation", "heads"), ("theta", "theta"), ("group", "groups")):
            shares = [one[f"better_{what}"] / one[f"heads_{what}"] for one in mine]
            row[f"{name} better %"] = f"{100 * sum(shares) / len(shares):.0f}"
            if what == "perturbation":
                row["least to most %"] = f"{100 * min(shares):.0f} to {100 * max(shares):.0f}"
        mean = means.get((budget, method))
        if mean is not None:
            share = mean["better_perturbation"] / mean["heads_perturbation"]
            row["by mean of texts %"] = f"{100 * share:.0f}"
        for what in ("perturbation", "layer", "hidden"):
            if mine[0][what] is not None:
                ratio = sum(one[what] for one in mine) / sum(one[what] for one in other)
                row[f"{what} ratio"] = f"{ratio:.3f}"
        found.append(row)
    return found


def _norms_told(lines: Sequence[Line]) -> list[Line]:
    """Mean and quantiles over texts, layers and KV heads."""
    found = []
    for name in (key for key, value in lines[0].items() if isinstance(value, list)):
        values = torch.tensor([number for line in lines for number in line[name]])
        quantiles = torch.quantile(values, torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])).tolist()
        names = ("least", "10 %", "median", "90 %", "most")
        found.append({
            "of each KV head": name, "heads": len(values), "mean": float(values.mean()),
            **dict(zip(names, quantiles, strict=True)),
        })  # fmt: skip
    return found
