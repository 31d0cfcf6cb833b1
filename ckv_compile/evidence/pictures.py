"""Pictures of what eviction did; matplotlib, the ``[plot]`` extra, is loaded when one is drawn.

Colours are of Okabe and Ito's set and of maps that read alike for all kinds of colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .candidates import Spec
from .evaluate import BOTH
from .scores import Score

if TYPE_CHECKING:
    from .perturbation import PerturbationReport
    from .timing import Timing

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures take matplotlib: pip install 'ckv-compile[plot]'"
        ) from error
    # Not pyplot: it would choose a window system and keep every figure.
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def kept_map(report: PerturbationReport, method: str, budget: Spec) -> Any:
    """Which positions each KV head of each layer keeps: a row for each head, black where kept."""
    rows: list[torch.Tensor] = []
    ticks = []
    sites = list(dict.fromkeys(row.site for row in report.rows))
    for i, site in enumerate(sites):
        keep = report.kept[site, method, budget]
        ticks.append((len(rows) + (len(keep) - 1) / 2, i))
        for positions in keep:
            line = torch.zeros(report.tokens)
            line[positions] = 1
            rows.append(line)
    figure = _figure(10, max(3.0, 0.055 * len(rows) + 1.4))
    axes = figure.subplots()
    axes.imshow(
        torch.stack(rows).numpy(), aspect="auto", cmap="Greys", vmin=0, vmax=1,
        interpolation="antialiased", extent=(0, report.tokens, len(rows) - 0.5, -0.5),
    )  # fmt: skip
    shown = ticks[:: math.ceil(len(ticks) / 15)]
    axes.set_yticks([at for at, _ in shown], [str(i) for _, i in shown])
    heads = len(rows) // len(sites)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel(f"layer ({heads} KV heads each)")
    axes.set_title(f"entries kept (black) by {method} at budget {budget}")
    return figure


def head_maps(report: PerturbationReport, budget: Spec, methods: Sequence[str]) -> Any:
    """Perturbation of each query head by layer for two methods, and their ratio."""
    maps = [
        torch.tensor([row.perturbation for row in report.of(method, budget)]) for method in methods
    ]
    from matplotlib.colors import LogNorm

    layers, heads = maps[0].shape
    figure = _figure(max(9.0, 0.75 * heads + 4), max(3.5, 0.16 * layers + 1.6))
    panels = figure.subplots(1, 3, sharey=True)
    # One head that hardly moves must not take half of the colours.
    least = max(float(torch.stack(maps).quantile(0.02)), 1e-9)
    norm = LogNorm(least, max(max(float(one.max()) for one in maps), 2 * least))
    for axes, one, method in zip(panels, maps, methods, strict=False):
        drawn = axes.imshow(one.clamp(min=least).numpy(), aspect="auto", cmap="cividis", norm=norm)
        axes.set_title(method)
        axes.set_xlabel("query head")
    figure.colorbar(drawn, ax=panels[:2], label="perturbation L, L1 norm (log scale)")
    ratio = (maps[1].clamp(min=1e-9) / maps[0].clamp(min=1e-9)).log2()
    most = max(float(ratio.abs().quantile(0.98)), 0.1)
    drawn = panels[2].imshow(ratio.numpy(), aspect="auto", cmap="PuOr", vmin=-most, vmax=most)
    better = int((maps[1] < maps[0]).sum())
    panels[2].set_title(f"{methods[1]} / {methods[0]}:\nlower in {better} of {ratio.numel()} heads")
    panels[2].set_xlabel("query head")
    figure.colorbar(drawn, ax=panels[2], label="log2 of the ratio of L (below 0: lower)")
    panels[0].set_ylabel("layer")
    seen = "not seen by the methods" if report.later else "of the window"
    figure.suptitle(f"budget {budget} of {report.tokens} tokens, {report.queries} queries {seen}")
    return figure


def perturbation_curves(report: PerturbationReport) -> Any:
    """Mean perturbation and hidden-state distance over the budget, a line for each method."""
    figure = _figure(10, 4)
    from matplotlib.ticker import StrMethodFormatter

    left, right = figure.subplots(1, 2)
    for i, method in enumerate(report.methods):
        rows = [row for row in report.summary() if row["method"] == method]
        shares = [100 * row["kept"] / report.tokens for row in rows]
        style = {"color": _COLOURS[i % 7], "marker": _MARKS[i % 7], "label": method}
        style["linestyle"] = _LINES[i % 4]
        left.plot(shares, [row["perturbation"] for row in rows], **style)
        distances = [row["hidden"] for row in rows]
        if None not in distances:
            right.plot(shares, distances, **style)
    for axes, what in (
        (left, "perturbation L of a head (L1 norm, mean)"),
        (right, "distance of hidden states (relative L2,\nlast layer)"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="entries kept (% of the prompt)", ylabel=what)
        _percent_ticks(axes)
        for which in ("major", "minor"):
            getattr(axes.yaxis, f"set_{which}_formatter")(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3, which="both", axis="y")
    left.legend()
    return figure


def score_curves(scores: Sequence[Score]) -> Any:
    """Score over budget with 95 % intervals: a panel for each task and setting."""
    settings = [s for s in dict.fromkeys(one.setting for one in scores) if s != BOTH]
    tasks = list(dict.fromkeys((one.task, one.length) for one in scores))
    methods = [m for m in dict.fromkeys(one.method for one in scores) if m != "full"]
    if len(methods) > len(_COLOURS):
        raise ValueError(
            f"{len(methods)} methods in one picture; it takes {len(_COLOURS)}: name them, --methods"
        )
    figure = _figure(1.5 + 4.5 * len(settings), 0.9 + 3 * len(tasks))
    panels = figure.subplots(len(tasks), len(settings), sharex=True, sharey=True, squeeze=False)
    for row, (task, length) in zip(panels, tasks, strict=True):
        for axes, setting in zip(row, settings, strict=True):
            for i, method in enumerate(methods):
                mine = [
                    one
                    for one in scores
                    if (one.task, one.length, one.setting, one.method)
                    == (task, length, setting, method)
                ]
                _curve(axes, mine, method, i, len(methods))
            for one in scores:
                if one.setting == BOTH and (one.task, one.length) == (task, length):
                    axes.axhline(100 * one.mean, color="#666666", linewidth=1, label="full cache")
            axes.set_title(f"{task}, {length:,} tokens, {setting}", fontsize=10)
            axes.set_ylim(-4, 104)
            axes.set_xscale("log")
            _percent_ticks(axes)
            axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("budget (% of the prompt kept)")
    for axes in panels[:, 0]:
        axes.set_ylabel("score (%)")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _curve(axes: Any, scores: Sequence[Score], method: str, i: int, count: int) -> None:
    scores = sorted((s for s in scores if isinstance(s.budget, float)), key=lambda s: s.budget)
    # Beside each other, so that no bar hides another.
    spread = 1 + 0.03 * (i - (count - 1) / 2)
    x = [100 * float(s.budget) * spread for s in scores]
    y = [100 * s.mean for s in scores]
    low = [max(100 * (s.mean - s.low), 0.0) for s in scores]
    high = [max(100 * (s.high - s.mean), 0.0) for s in scores]
    axes.errorbar(
        x, y, yerr=[low, high], label=method, capsize=2, elinewidth=0.8, markersize=5,
        color=_COLOURS[i % 7], marker=_MARKS[i % 7], linestyle=_LINES[i % 4],
    )  # fmt: skip


def _percent_ticks(axes: Any) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(FixedLocator([2.5, 5, 10, 20, 40, 70, 100]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def cache_growth(timings: Sequence[Timing]) -> Any:
    """Bytes of cache from the end of the prompt on, a line for each budget."""
    figure = _figure(8, 4.2)
    axes = figure.subplots()
    for i, timing in enumerate(timings):
        full = timing.method == "full"
        label = "full cache" if full else f"{timing.allocation}, budget {timing.budget}"
        sizes = [size / 2**20 for size in timing.bytes_by_token]
        style = {"color": _COLOURS[i % 7], "linestyle": _LINES[i % 4], "drawstyle": "steps-post"}
        axes.plot(range(len(sizes)), sizes, label=label, **style)
    axes.set_xlabel(f"tokens generated behind a prompt of {timings[0].tokens:,}")
    axes.set_ylabel("storage of keys and values (MiB),\nroom to grow included")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
