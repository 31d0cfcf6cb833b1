"""Results as tables of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .perturbation import PerturbationReport
    from .scores import Score


def table(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> str:
    """Rows with the same keys, which are the head; numbers to three digits."""
    if not rows:
        return ""
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(line) + " |" for line in (padded[0], rule, *padded[1:]))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def perturbation_table(report: PerturbationReport) -> str:
    """The report's summary, and what its columns mean."""
    first = report.methods[0]
    seen = "that no method has seen" if report.later else "that the methods score by"
    rows = []
    for row in report.summary():
        share = row[f"better_than_{first}"]
        rows.append({
            "budget": row["budget"],
            "method": row["method"],
            "kept": f"{row['kept']} of {report.tokens}",
            "L": row["perturbation"],
            "theta": row["theta"],
            "L/theta": row["tightness"],
            "sigma, stage 1": row["sigma_first"],
            "sigma": row["sigma"],
            f"heads better than {first}": None if share is None else f"{share:.0%}",
            "hidden states": row["hidden"],
        })  # fmt: skip
    return (
        f"perturbation of {report.tokens:,} tokens, measured on {report.queries} queries {seen}\n"
        f"{table(rows)}\n"
        "L: ||o - o_N||_1 of a head's output, theta its bound, sigma the attention that is kept, "
        "stage 1 and all;\nmeans over heads. hidden states: relative distance behind the last "
        "layer" + (f"; none: {report.note}" if report.note else "")
    )


def score_table(scores: Sequence[Score], *, markdown: bool = False) -> str:
    """Means with their intervals; ``better`` and ``worse`` compare with the first method."""
    return table(
        [
            {
                "task": score.task,
                "tokens": score.length,
                "setting": score.setting,
                "budget": score.budget,
                "method": score.method,
                "score": f"{100 * score.mean:.0f}",
                "95 % interval": f"{100 * score.low:.0f} to {100 * score.high:.0f}",
                "n": score.samples,
                "better / worse": f"{score.better} / {score.worse}",
                "loss": f"{score.loss:.2f}",
                "lower loss": score.lower_loss,
                "cache": f"{score.cache_bytes / 2**20:.1f} MiB" if score.cache_bytes else None,
            }
            for score in scores
        ],
        markdown=markdown,
    )


def wide_table(
    scores: Sequence[Score], timings: Sequence[Mapping[str, Any]] = (), *, markdown: bool = False
) -> str:
    """A table for each task and setting with a row for each method and a column for each budget.

    Args:
        timings: rows of ``bench --json``, whose time for a token stands beside a method with the
            same allocation; which entries of a head are kept takes no time when they are read.
    """
    cuts = [score for score in scores if score.allocation]
    budgets = sorted({score.budget for score in cuts}, key=str)
    seconds = {(row["allocation"], str(row["budget"])): row["per_token_s"] for row in timings}
    timed = [budget for budget in budgets if str(budget) in {known for _, known in seconds}]
    parts = []
    for where in dict.fromkeys((score.task, score.length, score.setting) for score in cuts):
        here = [score for score in cuts if (score.task, score.length, score.setting) == where]
        rows = []
        for method in dict.fromkeys(score.method for score in here):
            mine = {score.budget: score for score in here if score.method == method}
            row: dict[str, Any] = {"method": method.replace(":allocation=", ", ")}
            row |= {_head(budget, here): _wide_cell(mine.get(budget)) for budget in budgets}
            if timed:
                where_kept = ((mine[b].allocation, str(b)) if b in mine else None for b in timed)
                times = (seconds.get(one) if one else None for one in where_kept)
                shown = ("-" if time is None else f"{1000 * time:.1f}" for time in times)
                row["ms per token"] = " / ".join(shown)
            rows.append(row)
        samples = sorted({score.samples for score in here})
        count = " to ".join(str(n) for n in dict.fromkeys((samples[0], samples[-1])))
        full = [s for s in scores if not s.allocation and (s.task, s.length) == where[:2]]
        told = "".join(f"; full cache: {_wide_cell(score)}" for score in full)
        parts += [f"{where[0]}, {where[1]:,} tokens, {where[2]}: {count} samples{told}\n"]
        parts += [table(rows, markdown=markdown) + "\n"]
    return "\n".join(parts).rstrip()


def _head(budget: Any, scores: Sequence[Score]) -> str:
    """A budget and the cache that it leaves, which is the same for all methods."""
    share = f"{100 * budget:g} %" if isinstance(budget, float) else str(budget)
    size = next((score.cache_bytes for score in scores if score.budget == budget), 0)
    return f"{share}, {size / 2**20:.1f} MiB" if size else share


def _wide_cell(score: Score | None) -> str:
    """Score, its 95 % interval, and the loss."""
    if score is None:
        return "-"
    interval = f"({100 * score.low:.0f} to {100 * score.high:.0f})"
    return f"{100 * score.mean:.0f} {interval} {score.loss:.2f}"
