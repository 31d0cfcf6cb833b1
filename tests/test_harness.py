"""lm-evaluation-harness over an optimised model, offline: two samples of its own tasks."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wordy import save_model

import ckv_compile

# Importing it and indexing its tasks takes most of a minute.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="pip install 'ckv-compile[harness]'"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def requests(count: int) -> list[object]:
    from lm_eval.api.instance import Instance

    texts = ["a word and another one. " * 12, "something else altogether, " * 9][:count]
    options = {"until": ["~"], "max_gen_toks": 6, "do_sample": False}
    return [
        Instance("generate_until", {}, (text, dict(options)), i) for i, text in enumerate(texts)
    ]


def test_both_ways_answer_as_the_optimised_model(folder):
    from lm_eval.models.huggingface import HFLM

    from ckv_compile.evidence.harness import OptimizedLM
    from ckv_compile.evidence.models import load

    options = {"budget": 0.3, "lowering": "eager"}
    ours = OptimizedLM(str(folder), device="cpu", batch_size=1, **options)
    model, tokenizer = load(str(folder))
    theirs = HFLM(ckv_compile.optimize(model, **options), tokenizer=tokenizer, batch_size=1)
    answers = ours.generate_until(requests(2))
    assert answers == theirs.generate_until(requests(2))
    for model in (ours.model, theirs.model):
        report = ckv_compile.explain(model)
        assert report.evicted == 2 and report.sites[0].budget < report.sites[0].kv_len
    ckv_compile.restore(model)
    assert answers != theirs.generate_until(requests(2)), "the cut must make a difference here"


def test_a_typo_costs_no_model(folder):
    from ckv_compile.evidence.harness import OptimizedLM

    with pytest.raises(ValueError, match=r"budget=2\.0 is not a share"):
        OptimizedLM("/no/such/folder", budget=2.0)


def test_a_ruler_task_from_its_command(folder, tmp_path):
    """Frequent words: generated, no download. Two of its 500 samples."""
    command = [sys.executable, "-m", "ckv_compile.evidence.harness", "--model", "ckv"]
    command += ["--tasks", "ruler_fwe", "--limit", "2", "--output_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={folder},budget=0.3,lowering=eager"]
    command += ["--metadata", f'{{"max_seq_lengths": [1024], "tokenizer": "{folder}"}}']
    done = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ruler_fwe" in done.stdout and list(tmp_path.rglob("*.json"))
