"""Check every architecture, each in its own process, and write what was found as a table."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from .check import ALONE, NOT_RUN, RIGHT, WRONG, Result
from .tiny import CAUSAL, SEQ2SEQ, architectures

_INTRO = """# Coverage

Every causal and seq2seq architecture of transformers {version}, as tiny random models on a CPU,
float32, lowered without Inductor. Made by `python -m ckv_compile coverage`; do not edit.

- **right**: some cache is cut at `budget=0.5`, its sizes are exact, and the tokens and logits are
  those of the unmodified model whose attention does not see what was evicted; where the model calls
  SDPA, the entries kept are those that the reference selects; with `budget=1.0`, and for a padded
  batch, the tokens are the unmodified model's, or those of the rows alone.
- **left alone**: no cache is cut, for the reasons given, and all tokens are the unmodified model's.
- **wrong**: none of the two. A bug of ours.
- **not run**: the unmodified model could not be built, or does not generate with a cache, here.
"""


def run(
    results: Path, page: Path | None, *, only: list[str], timeout_s: int, retry: bool
) -> list[Result]:
    """Check what ``results`` (JSON lines) does not have yet, and write ``page`` (Markdown).

    Args:
        only: model types; all of them if empty.
        timeout_s: for one architecture.
        retry: whether to check again what was not right.
    """
    from rich.progress import Progress

    done = {(r.kind, r.name): r for r in _read(results)}
    if retry:
        done = {key: r for key, r in done.items() if r.status == RIGHT}
    wanted = [one for one in architectures() if not only or one[1] in only]
    unknown = set(only) - {name for _, name in wanted}
    if unknown:
        raise ValueError(f"unknown architectures: {', '.join(sorted(unknown))}")
    todo = [one for one in wanted if one not in done]
    results.parent.mkdir(parents=True, exist_ok=True)
    with Progress() as progress:
        task = progress.add_task(
            "architectures", total=len(wanted), completed=len(wanted) - len(todo)
        )
        for kind, name in todo:
            progress.update(task, description=f"{kind} {name}")
            result = _in_process(kind, name, timeout_s)
            done[kind, name] = result
            with results.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            progress.advance(task)
    found = [done[one] for one in wanted if one in done]
    if page is not None:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(table(found))
    return found


def _read(results: Path) -> list[Result]:
    if not results.exists():
        return []
    lines = results.read_text().splitlines()
    return [Result(**json.loads(line)) for line in lines if line.strip()]


def _in_process(kind: str, name: str, timeout_s: int) -> Result:
    """A crash, or a compile that never ends, is that architecture's alone."""
    command = [sys.executable, "-m", "ckv_compile.coverage.worker", kind, name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return Result(kind, name, NOT_RUN, note=f"longer than {timeout_s} s")
    lines = ran.stdout.splitlines()
    if ran.returncode or not lines:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        return Result(kind, name, WRONG, note=f"exit {ran.returncode}: {last[:200]}")
    return Result(**json.loads(lines[-1]))


def table(results: list[Result]) -> str:
    """The page: counts, then one row for each architecture."""
    import transformers

    parts = [_INTRO.format(version=transformers.__version__)]
    parts.append(f"{len(results)} of {len(architectures())} architectures have been checked.\n")
    parts.append("| | " + " | ".join((RIGHT, ALONE, WRONG, NOT_RUN)) + " |\n|---|---|---|---|---|")
    for kind in (CAUSAL, SEQ2SEQ):
        counts = Counter(r.status for r in results if r.kind == kind)
        cells = [str(counts[status]) for status in (RIGHT, ALONE, WRONG, NOT_RUN)]
        parts.append(f"| {kind} | " + " | ".join(cells) + " |")
    parts.append(
        "\n| architecture | kind | status | cut | reasons | graph breaks (ours / theirs) | "
        "recompiles | note |\n|---|---|---|---|---|---|---|---|"
    )
    for r in sorted(results, key=lambda r: (r.kind, r.name)):
        failed = [name for name, ok in r.checks.items() if not ok]
        note = "; ".join(
            [*(f"not equal: {name}" for name in failed), *([r.note] if r.note else [])]
        )
        row = (
            f"`{r.name}`", r.kind, r.status, f"{r.evicted} of {r.layers}" if r.layers else "",
            ", ".join(f"{k} {v}" for k, v in sorted(r.reasons.items())),
            f"{r.breaks_ours} / {r.breaks_theirs}", str(r.recompiles), note.replace("|", "/"),
        )  # fmt: skip
        parts.append("| " + " | ".join(row) + " |")
    return "\n".join(parts) + "\n"


def summary(results: list[Result]) -> dict[str, Any]:
    """How many of each status, by kind."""
    counts = Counter((r.kind, r.status) for r in results)
    return {f"{kind} {status}": number for (kind, status), number in sorted(counts.items())}
