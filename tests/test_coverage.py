"""The coverage tool: a sample of architectures, and what it does with what it finds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from families import tiny

from ckv_compile.cli import main
from ckv_compile.coverage import check as checks
from ckv_compile.coverage import runner
from ckv_compile.coverage.tiny import architectures, build

RECORD = Path(__file__).parents[1] / "docs" / "coverage.jsonl"
# One for each way of writing attention, masks and biases. Without padded batches: with those they
# take three times as long, and are in the slow tests, with all others.
SAMPLE = [
    *(("causal", name, checks.RIGHT) for name in ("gpt2", "gpt_oss", "llama4_text", "zaya")),
    *(("causal", name, checks.RIGHT) for name in ("gptj", "codegen", "ctrl", "biogpt", "bloom")),
    *(("causal", name, checks.RIGHT) for name in ("xglm", "deepseek_v3")),
    *(("causal", name, checks.RIGHT) for name in ("mpt", "beam", "afmoe", "qwen3_next", "gemma2")),
    *(("causal", name, checks.ALONE) for name in ("bitnet", "diffllama", "doge")),
    *(("seq2seq", name, checks.RIGHT) for name in ("t5", "bart", "marian", "led", "mt5")),
    ("seq2seq", "fsmt", checks.ALONE),
]


@pytest.mark.parametrize(("kind", "name", "status"), SAMPLE)
def test_a_sample_of_architectures(kind, name, status):
    result = checks.check(kind, name, padded=False)
    assert result.status == status, result


def recorded():
    """The rows that stand in docs/coverage.jsonl, the last of each architecture."""
    lines = RECORD.read_text().splitlines()
    return {(row["kind"], row["name"]): row for row in map(json.loads, lines)}


def test_the_record_is_whole_and_nothing_in_it_is_wrong():
    """A claim about every architecture is no claim while some have not been looked at."""
    rows = recorded()
    assert set(rows) == set(architectures())
    right = Counter(row["kind"] for row in rows.values() if row["status"] == checks.RIGHT)
    assert right["causal"] >= 140 and right["seq2seq"] >= 26
    assert not [row for row in rows.values() if row["status"] == checks.WRONG]
    for row in rows.values():
        said = row["reasons"] or not row["layers"]
        assert said or row["status"] != checks.ALONE, f"{row['name']} is left alone without a word"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), architectures())
def test_every_architecture_does_what_the_record_says(kind, name):
    """What was right must not become wrong, nor be refused; minutes each, hours in all."""
    result = runner._in_process(kind, name, 600)
    assert result.status == recorded()[kind, name]["status"], result


def test_every_architecture_is_listed_and_small():
    names = [name for _, name in architectures()]
    assert len(names) > 200 and {"llama", "t5", "deepseek_v3"} <= set(names)
    assert sum(p.numel() for p in build("causal", "llama").parameters()) < 200_000


def test_a_wrong_model_is_called_wrong(monkeypatch):
    """The tool must not bless what it cannot tell from the truth: here one kept entry is off."""
    model = tiny()
    monkeypatch.setattr(checks, "build", lambda kind, name: model)
    assert checks.check("causal", "llama", padded=False).status == checks.RIGHT

    def shifted(*args):
        return {i: (kept + 1).clamp(max=checks.N - 1) for i, kept in real(*args).items()}

    real = checks._kept
    monkeypatch.setattr(checks, "_kept", shifted)
    result = checks.check("causal", "llama", padded=False)
    assert result.status == checks.WRONG
    assert not result.checks["logits"] and not result.checks["selection"]


def test_a_crash_is_the_architectures_alone(monkeypatch):
    def broken(kind, name):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(checks, "build", broken)
    result = checks.check("causal", "llama", padded=False)
    assert result.status == checks.NOT_RUN and result.note == "RuntimeError: no such thing"


def test_an_interrupted_run_goes_on_and_writes_its_table(monkeypatch, tmp_path, capsys):
    """Hours of work must not be lost, nor done twice."""
    asked = []

    def checked(kind, name, timeout_s):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        status = checks.WRONG if name == "opt" else checks.RIGHT
        return checks.Result(kind, name, status, evicted=2, layers=2, checks={"tokens": False})

    monkeypatch.setattr(runner, "_in_process", checked)
    results, page = tmp_path / "new" / "r.jsonl", tmp_path / "docs" / "coverage.md"
    argv = ["coverage", "--results", str(results), "--page", str(page), "--only", "gpt2", "opt"]
    with pytest.raises(KeyboardInterrupt):
        main(argv)
    assert main(argv) == 1  # something is wrong
    assert sorted(asked) == ["gpt2", "opt", "opt"]
    assert [json.loads(line)["name"] for line in results.read_text().splitlines()] == [
        "gpt2",
        "opt",
    ]
    assert "| `opt` | causal | wrong | 2 of 2 |" in page.read_text()
    assert "not equal: tokens" in page.read_text() and "1  causal wrong" in capsys.readouterr().out
    assert main([*argv, "--retry"]) == 1 and asked[3:] == ["opt"]


def test_an_unknown_architecture_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["coverage", "--results", str(tmp_path / "r"), "--only", "gpt5"])
    assert "unknown architectures: gpt5" in capsys.readouterr().err


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "coverage" in capsys.readouterr().out
