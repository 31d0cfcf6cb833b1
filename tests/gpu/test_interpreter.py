"""Runs the kernels, and whole generated graphs, on the CPU; see interpreted.py."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu.nodes import NODES, SMALL, generated


def _run_interpreted(folder: Path, examples: int) -> None:
    """Triton reads the variable as it is imported, so it takes a process of its own."""
    env = {
        "TRITON_INTERPRET": "1",
        "CKV_GENERATED": str(folder),
        "CKV_EXAMPLES": str(examples),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
    }
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    root = tests.parents[2]
    run = subprocess.run(command, cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout and " skipped" not in run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    for name in NODES:
        code, _ = generated(name, 90, SMALL)
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(code)))
    return folder


def test_the_kernels_compute_what_the_oracle_does(folder: Path) -> None:
    """Prevents a kernel, or a call of it, that compiles and computes something else."""
    _run_interpreted(folder, examples=12)


@pytest.mark.slow
def test_the_kernels_compute_what_the_oracle_does_on_many_examples(folder: Path) -> None:
    """Prevents what a few examples do not meet."""
    _run_interpreted(folder, examples=200)
