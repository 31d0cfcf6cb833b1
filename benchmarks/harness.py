"""What all benchmarks share: timing in turns, peak memory, a table, a JSON file."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of each, in turn"
    )
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    options.add_argument("--quick", action="store_true", help="the smallest sizes alone")
    options.add_argument("--json", type=Path, metavar="FILE", help="default: benchmarks/results/")
    return options


def timed(candidates: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each, after one that does not count.

    The candidates take turns, so that what else the machine does hits them alike.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for candidate in candidates.values():
        candidate()
    for _ in range(repeats):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_extra_bytes(candidate: Callable[[], Any]) -> int:
    """By how much the resident set grows at most while the candidate runs (Linux)."""
    gc.collect()
    # What the allocator has kept of earlier runs would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from what is resident now
    before = _status("VmRSS")
    result = candidate()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def watched(items: Sequence[Any], what: str) -> Any:
    """The items, with a progress bar."""
    return track(items, what, console=Console(stderr=True), transient=True)


def report(name: str, title: str, rows: Sequence[Mapping[str, Any]], options: Any) -> None:
    """Print the rows as a table and write them, with the machine, as JSON."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # As wide as it needs to be where nobody looks at a terminal.
    Console(width=None if os.isatty(1) else 160).print(table)
    path = options.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "gpu": "not timed on a GPU",
    }
    path.write_text(json.dumps({"title": title, "machine": machine, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line]
    return names[0].partition(":")[2].strip() if names else platform.processor()


def mebibytes(count: float) -> float:
    return count / 2**20
