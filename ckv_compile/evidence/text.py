"""Results as tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence
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
            }
            for score in scores
        ],
        markdown=markdown,
    )
