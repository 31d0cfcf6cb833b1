"""Every command of the tutorial, run as it stands there, on a tiny random model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from families import prompt, tiny
from wordy import save_model

from ckv_compile.cli import main

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line) for line in lines]


def test_there_is_nothing_but_commands_that_are_run():
    """Prevents a command of another kind from standing there unrun."""
    kinds = {" ".join(words[:3]) for words in commands()}
    assert kinds == {"python -m ckv_compile", "pip install -e", "pip install --no-deps"}
    assert [words[3] for words in commands()[2:]] == ["explain", "bench", "perturb", "eval"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.parametrize("words", commands()[2:], ids=lambda words: words[3])
def test_a_command_does_what_is_said_of_it(words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*words[3:], "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    expected = {
        "explain": ("2 sites, 2 evicted", None),
        "bench": ("cache_bytes", "growth.png"),
        "perturb": ("hidden states", "report.html"),
        "eval": ("95 % interval", "curves.png"),
    }
    told, written = expected[words[3]]
    assert told in out
    assert written is None or (tmp_path / written).stat().st_size > 10_000


def test_its_python_is_one_line_that_works():
    (code,) = blocks("python")
    names = {"model": tiny()}
    exec(code, names)
    with torch.no_grad():
        cache = names["model"](prompt(100)).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [50, 50]
