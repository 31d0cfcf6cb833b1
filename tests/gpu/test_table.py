"""The page about GPUs says what its script computes."""

from __future__ import annotations

from gpu import estimate
from gpu.nodes import DECODE, OURS
from gpu.table import PAGE, between


def test_the_page_holds_the_estimate_of_the_script() -> None:
    """Prevents numbers that nobody can make again; they take no GPU and no compiler."""
    assert between(PAGE.read_text(), "estimate") == estimate.table()


def test_the_page_holds_the_usage_of_each_kernel() -> None:
    """Prevents a kernel that the page leaves out, and a spill that it admits."""
    rows = [row.split("|") for row in between(PAGE.read_text(), "usage").splitlines()[2:]]
    cells = {row[1].strip(" `"): row[2:-1] for row in rows if len(row) > 2}
    assert {*OURS, *DECODE} <= set(cells)
    for name in (*OURS, *DECODE):
        assert [cell.split("/")[1].strip() for cell in cells[name]] == ["0"] * 3
