"""Import is free, and rooms import only downwards."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ckv_compile

PACKAGE = Path(ckv_compile.__file__).parent

# room: the rooms it may import. A room is a file or a folder of the package.
ARROWS = {
    "registry": set(),
    "budget": set(),
    "policies": set(),
    "config": {"budget", "registry", "policies"},
    "sizes": set(),
    "site": set(),
    "kernels": {"site", "budget", "config"},
    "methods": {"kernels", "site", "budget", "config", "sizes", "registry", "policies"},
    "passes": {"methods", "kernels", "site", "config", "sizes"},
    "report": {"site", "config"},
    "backend": {"passes", "methods", "report", "site", "config"},
    "cache": {"sizes"},
    "plan": {"budget", "config", "sizes"},
    "inputs": {"cache", "sizes"},
    "cuts": {"inputs", "config", "sizes"},
    "region": {"backend", "passes", "plan", "report", "config"},
    "runtime": {
        "inputs",
        "cache",
        "plan",
        "cuts",
        "region",
        "backend",
        "report",
        "budget",
        "config",
        "sizes",
    },
    "export": {"backend", "passes", "report", "site", "config"},
    "api": {
        "runtime",
        "region",
        "export",
        "cache",
        "backend",
        "report",
        "budget",
        "config",
        "policies",
    },
    # A tool beside the library: it may look at everything, and nothing looks at it but the shell.
    "coverage": {"api", "cache", "kernels", "report", "config"},
    "evidence": {
        "api",
        "backend",
        "budget",
        "cache",
        "config",
        "inputs",
        "kernels",
        "methods",
        "passes",
        "policies",
        "region",
        "registry",
        "runtime",
        "site",
        "sizes",
    },
    "cli": {"coverage", "evidence"},
    "__main__": {"cli"},
    "__init__": {
        "api",
        "budget",
        "cache",
        "config",
        "evidence",
        "methods",
        "policies",
        "registry",
        "report",
        "site",
    },
}
# Outside knowledge that is one room's alone.
ONLY = {
    # C++ of our own is built with its tools.
    "torch._inductor": {"backend", "kernels/cpu"},
    "transformers": {"cache", "coverage", "evidence"},
    "matplotlib": {"evidence"},
    "lm_eval": {"evidence"},
    "triton": {"kernels/gpu"},
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of this package that the file imports, relatively or by name."""
    depth = len(path.relative_to(PACKAGE).parts)
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = path.relative_to(PACKAGE).parts[: depth - node.level]
            parts = [*above, *(node.module.split(".") if node.module else [])]
            rooms |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ckv_compile"):
            rooms |= {(node.module or "").split(".")[1]}
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path):
    """A room that imports upwards ties the package into a knot."""
    assert imported_rooms(path) <= ARROWS[room_of(path)]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_knowledge_has_one_home(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    for outside, rooms in ONLY.items():
        known = {n for n in names if n and (n == outside or n.startswith(outside + "."))}
        inside = {folder.as_posix() for folder in path.relative_to(PACKAGE).parents}
        assert not known or rooms & {room_of(path), *inside}, known


def test_import_loads_neither_triton_nor_transformers():
    """A user who never touches a GPU or Hugging Face must not pay for them."""
    code = (
        "import sys, ckv_compile\n"
        "heavy = {'triton', 'transformers', 'torch._inductor.compile_fx', 'matplotlib', 'rich'}\n"
        "heavy |= {'lm_eval', 'ckv_compile.evidence'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
