"""Rewrites the tables of docs/gpu.md: ``python tests/gpu/table.py`` (two minutes, no GPU)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":  # the folder itself is there instead, and `gpu` is a package in tests
    sys.path[0] = str(Path(__file__).parents[1])

import torch
import triton
from gpu import estimate
from gpu.codegen import Code, kernels_in
from gpu.nodes import generated, products
from gpu.offline import Usage, shared_memory_limit, usage_of

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
GPUS = {80: "A100, sm_80", 90: "H100, sm_90", 100: "B200, sm_100"}


def replaced(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers ``name``."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    assert page.count(begin) == page.count(end) == 1
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def between(page: str, name: str) -> str:
    """What stands between the markers ``name``."""
    return page.partition(f"<!-- {name}: begin -->\n")[2].partition(f"\n<!-- {name}: end -->")[0]


def _ours(code: Code, cc: int) -> dict[str, Usage]:
    return {
        kernel.name + (", l2" if "'quadratic': True" in kernel.source else ""): usage_of(kernel, cc)
        for kernel in kernels_in(code)
        if not kernel.name.startswith("triton_")
    }


def usage_table() -> str:
    """Markdown: registers, spilled bytes and shared memory of our kernels."""
    columns: dict[int, dict[str, Usage]] = {}
    for cc in GPUS:
        bfloat16, float32 = (products(dtype, 128) for dtype in (torch.bfloat16, torch.float32))
        columns[cc] = _ours(bfloat16, cc) | _ours(generated("plain", cc)[0], cc)
        columns[cc] |= {f"{name}, float32": of for name, of in _ours(float32, cc).items()}
    lines = [f"| | {' | '.join(GPUS.values())} |", f"|---{'|---' * len(GPUS)}|"]
    for name in columns[80]:
        usages = (columns[cc][name] for cc in GPUS)
        cells = (f"{of.registers} / {of.spilled} / {of.shared:,}" for of in usages)
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    limits = (f"255 / 0 / {shared_memory_limit(cc):,}" for cc in GPUS)
    lines.append(f"| *limit* | {' | '.join(limits)} |")
    versions = f"torch {torch.__version__.partition('+')[0]}, Triton {triton.__version__}"
    return "\n".join([*lines, "", f"Made with {versions}."])


if __name__ == "__main__":
    text = PAGE.read_text()
    text = replaced(text, "usage", usage_table())
    PAGE.write_text(replaced(text, "estimate", estimate.table()))
