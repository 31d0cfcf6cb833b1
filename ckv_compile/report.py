"""What the passes found in a model and what they did, for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .config import EvictionConfig
from .site import AttentionSite, Projection, Rejection

NOTHING_MATCHED = "no attention was matched: the cache is not cut and the model runs unchanged"


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One matched attention. Sizes are those of the traced call; ``action`` says what was done."""

    site: str
    heads: int
    kv_heads: int
    groups: int
    head_dim: int
    weight: str
    mask: str
    cache: str
    phase: str
    action: str
    kv_len: int
    budget: int
    budget_from: str
    bytes_before: int
    bytes_after: int

    def at(self, budget: int) -> SiteRow:
        """The same call, had it kept ``budget`` entries."""
        after = self.bytes_before // self.kv_len * budget
        return dataclasses.replace(self, budget=budget, bytes_after=after)


@dataclasses.dataclass(frozen=True)
class RejectionRow:
    """One attention that was left alone, and why."""

    site: str
    node: str
    reason: str
    detail: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Report:
    """All sites and rejections of one or several graphs.

    ``print(report)`` shows it as text; ``report.to_dict()`` as plain data. ``graphs`` counts the
    graphs that were traced: more than one for a single call means that the model breaks the graph.
    """

    config: EvictionConfig
    sites: tuple[SiteRow, ...]
    rejections: tuple[RejectionRow, ...]
    graphs: int = 1

    @property
    def evicted(self) -> int:
        """How many caches are cut."""
        return sum(row.action == "evict" for row in self.sites)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.sites)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.sites)

    def summary(self) -> str:
        """The report in one line."""
        if not self.sites and not self.rejections:
            return "no attention in this graph"
        reasons = ", ".join(sorted({row.reason for row in self.rejections}))
        left = f"{len(self.rejections)} left alone" + (f" ({reasons})" if reasons else "")
        spec = self.config.budget.spec  # type: ignore[union-attr]
        phases = ", ".join(sorted({row.phase for row in self.sites})) or "no site"
        sizes = f"{_bytes(self.bytes_before)} -> {_bytes(self.bytes_after)}"
        return (
            f"{phases}: {len(self.sites)} sites, {self.evicted} evicted, {left}; "
            f"cache {sizes} (budget {spec!r})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for ``json.dumps``."""
        data = dataclasses.asdict(self)
        data["config"]["budget"] = data["config"]["budget"]["spec"]
        return data

    def __str__(self) -> str:
        lines = [self.summary()]
        if self.sites:
            head = ("site", "heads", "D", "weight", "mask", "cache", "action", "kept", "bytes")
            lines += _table([head, *map(_site_cells, self.sites)])
        elif self.rejections:
            lines.append(NOTHING_MATCHED)
        for row in self.rejections:
            lines.append(f"left alone: {row.site} at {row.node}: {row.reason}: {row.detail}")
            lines.append(f"            cure: {row.cure}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A site's sizes in the traced call.

    ``row_bytes``: of an entry for a batch of one. ``budget_from``: "input", "config" or "" (no
    eviction). ``folded``: whether a decode step reads grouped K and V without repeating them.
    """

    batch_size: int
    kv_len: int
    kept: int
    row_bytes: int
    weight: str
    cache: str
    budget_from: str
    folded: bool = False


def report_of(
    sites: Sequence[AttentionSite],
    rejections: Sequence[Rejection],
    config: EvictionConfig,
    describe: Callable[[AttentionSite], Traced],
) -> Report:
    """Read the sites of one graph into rows; ``describe`` knows the numbers of the traced call."""
    rows = tuple(_row(site, describe(site)) for site in sites)
    refused = tuple(
        RejectionRow(r.name or r.node.name, r.node.name, r.reason.name, r.detail, r.cure)
        for r in rejections
    )
    return Report(config, rows, refused)


def merged(reports: Sequence[Report], config: EvictionConfig) -> Report:
    """The reports of several graphs as one."""
    sites = tuple(row for report in reports for row in report.sites)
    rejections = tuple(row for report in reports for row in report.rejections)
    return Report(config, sites, rejections, graphs=len(reports))


def _row(site: AttentionSite, traced: Traced) -> SiteRow:
    per_entry = traced.batch_size * traced.row_bytes
    nothing = "keep all" if site.phase == "prefill" else f"none: {site.phase}"
    if traced.folded:
        nothing = "fold groups"
    return SiteRow(
        site=site.name,
        heads=site.num_attention_heads,
        kv_heads=site.num_key_value_heads,
        groups=site.num_key_value_groups,
        head_dim=site.head_dim,
        weight=_weight(site.projection, traced.weight),
        mask=site.mask_kind,
        cache=traced.cache,
        phase=site.phase,
        action="evict" if traced.budget_from else nothing,
        kv_len=traced.kv_len,
        budget=traced.kept,
        budget_from=traced.budget_from,
        bytes_before=per_entry * traced.kv_len,
        bytes_after=per_entry * traced.kept,
    )


def _weight(projection: Projection | None, name: str) -> str:
    """Through what the values were seen."""
    if projection is None:
        return "none: not read"
    layout = "[quantised]" if projection.matrix.opaque else "[out, in]"
    if projection.matrix.in_out and not projection.matrix.opaque:
        layout = "[in, out]"
    added = f" + {len(projection.adapters)} added" if projection.adapters else ""
    return f"{name} {layout}{added}" + (", gate left out" if projection.gated else "")


def _site_cells(row: SiteRow) -> tuple[str, ...]:
    return (
        row.site,
        f"{row.heads}/{row.kv_heads} (x{row.groups})",
        str(row.head_dim),
        row.weight,
        row.mask,
        row.cache,
        row.action,
        f"{row.budget} of {row.kv_len}",
        f"{_bytes(row.bytes_before)} -> {_bytes(row.bytes_after)}",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
