"""Arguments of ``explain``, ``perturb``, ``eval``, ``study`` and ``bench``, and what they run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..api import explain
from ..config import ALLOCATIONS, EvictionConfig
from . import evaluate, headscores, studies, study_tables
from .asker import Asker
from .candidates import every_candidate
from .evaluate import SETTINGS, Plan
from .models import SMOLLM2
from .perturbation import LayerRow, perturbation
from .scores import scores
from .shell import (
    INTERRUPTED,
    bar,
    budgets_from,
    loaded,
    methods_from,
    one_line,
    text_from,
)
from .tasks import TASKS
from .text import score_table, table, wide_table
from .timing import Timing, timings


def run(command: str, parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """One of the commands; returns the exit status."""
    return {
        "explain": run_explain,
        "perturb": run_perturb,
        "eval": run_eval,
        "study": run_study,
        "bench": run_bench,
        "headscores": run_headscores,
    }[command](parser, args)


def run_explain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Every attention of the model, matched or refused."""
    with one_line(parser):
        config = EvictionConfig(budget=args.budget, lowering="eager")
    model, tokenizer = loaded(parser, args.model)
    with one_line(parser):
        report = explain(model, input_ids=_ids(parser, args, tokenizer), config=config)
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)
    return 0 if report.sites else 1


def _ids(parser: argparse.ArgumentParser, args: argparse.Namespace, tokenizer: Any) -> Any:
    """The first ``--tokens`` tokens of the text, ``[1, n]``."""
    text = text_from(parser, args.text)
    found = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, : args.tokens]
    if found.shape[1] < args.tokens:
        parser.error(f"--tokens {args.tokens}: the text has {found.shape[1]}")
    return found.contiguous()


def run_perturb(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """How far each method moves each head; a report, rows as they come, pictures."""
    methods = methods_from(parser, args.methods)
    budgets = budgets_from(parser, args.budgets)
    model, tokenizer = loaded(parser, args.model)
    ids = _ids(parser, args, tokenizer)
    lines = args.rows.open("w", encoding="utf-8") if args.rows else None

    def write(rows: list[LayerRow]) -> None:
        if lines is not None:
            lines.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
            lines.flush()

    try:
        with one_line(parser):
            report = perturbation(
                model, ids, budgets, methods, queries=args.queries, later=args.later,
                progress=True, on_layer=write,
            )  # fmt: skip
    except KeyboardInterrupt:
        print(f"interrupted; {args.rows or 'no file'} holds the layers so far", file=sys.stderr)
        return INTERRUPTED
    finally:
        if lines is not None:
            lines.close()
    texts = tokenizer.batch_decode([[token] for token in ids[0].tolist()])
    report = dataclasses.replace(report, texts=tuple(texts))
    print(json.dumps(report.to_dict()) if args.json else report)
    if args.save is not None:
        with one_line(parser, f"cannot save {args.save}"):
            print(f"wrote {report.save(args.save)}", file=sys.stderr)
    return 0


def run_headscores(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """How far back each head looks."""
    model, tokenizer = loaded(parser, args.model)
    ids = _ids(parser, args, tokenizer)
    with one_line(parser):
        headscores.show(headscores.head_scores(model, ids), args)
    return 0


def run_eval(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Questions about long texts; answers go to a file that a second run extends."""
    if args.show:
        with one_line(parser):
            told = evaluate.told(args.results)
        wanted = (evaluate.FULL, *(args.methods or {one.method: one for one in told}))
        _show_scores(parser, args, [one for one in told if one.method in wanted])
        return 0
    names = args.methods or ("snapkv", "criticalkv")
    candidates = methods_from(parser, every_candidate() if args.all_methods else names)
    usual = ("0.05", "0.1", "0.2", "0.4") if args.all_methods else ("0.2", "0.5")
    budgets = budgets_from(parser, args.budgets or usual)
    with one_line(parser):
        plan = Plan(
            args.model or SMOLLM2, tuple(args.task), tuple(args.lengths), tuple(args.settings),
            args.samples, budgets, candidates, args.first_sample,
        )  # fmt: skip
    model, tokenizer = loaded(parser, args.model)
    status = 0
    try:
        with one_line(parser), bar("reading") as step:
            asker = Asker(model, tokenizer)
            if args.all_methods:
                plan = _without_refused(asker, plan)
            answers = evaluate.run(asker, plan, args.results, on_sample=step)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {args.results}", file=sys.stderr)
        answers, status = evaluate.held(plan, args.results), INTERRUPTED
    _show_scores(parser, args, answers)
    return status


def _without_refused(asker: Asker, plan: Plan) -> Plan:
    """Of every method those that the model can be measured under; of the others why not."""
    why = {one: asker.refusal(one) for one in plan.candidates}
    for one, reason in why.items():
        if reason:
            print(f"left out: {one.label}: {reason}", file=sys.stderr)
    return dataclasses.replace(plan, candidates=tuple(one for one in why if not why[one]))


def _show_scores(
    parser: argparse.ArgumentParser, args: argparse.Namespace, answers: list[evaluate.Answer]
) -> None:
    """Means as tables, plain data or a picture."""
    found = scores(answers, over_tasks=args.over_tasks)
    times = []
    if args.timings is not None:
        with one_line(parser, "cannot read --timings"):
            times = json.loads(args.timings.read_text(encoding="utf-8"))["rows"]
    if args.json:
        print(json.dumps([dataclasses.asdict(score) for score in found]))
    elif args.wide:
        print(wide_table(found, times, markdown=args.markdown))
    else:
        print(score_table(found, markdown=args.markdown))
    if args.save is not None and found:
        from .pictures import save, score_curves

        with one_line(parser, f"cannot save {args.save}"):
            save(score_curves(found), args.save)


def run_study(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """One of the studies that ``docs/results.md`` tells of."""
    model, tokenizer = loaded(parser, args.model)
    try:
        with one_line(parser), bar(args.name) as step:
            who = args.model or SMOLLM2
            given = (args.name, model, tokenizer, args.tokens, args.results)
            studies.run(*given, model_name=who, on_text=step)
    except KeyboardInterrupt:
        print(
            f"interrupted; {args.results} holds the texts so far; the same command goes on",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(study_tables.told(args.name, args.results, markdown=args.markdown))
    return 0


def run_bench(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Seconds and bytes of the model as it is and at each budget."""
    candidates = [methods_from(parser, [args.method], allocation=one)[0] for one in args.allocation]
    budgets = budgets_from(parser, args.budgets)
    model, tokenizer = loaded(parser, args.model)
    found: list[Timing] = []
    status = 0
    try:
        with one_line(parser), bar("full cache") as step:
            ids = _ids(parser, args, tokenizer)
            for candidate in candidates:
                for timing in timings(
                    model, ids, budgets, candidate,
                    lowering=args.lowering, new_tokens=args.new_tokens, repeats=args.repeats,
                    full=not found, on_step=step,
                ):  # fmt: skip
                    found.append(timing)
    except KeyboardInterrupt:
        print("interrupted; these are the budgets so far", file=sys.stderr)
        status = INTERRUPTED
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    rows = [dataclasses.asdict(timing) for timing in found]
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
    else:
        print(table([{k: v for k, v in row.items() if k != "bytes_by_token"} for row in rows]))
    if args.save is not None and found:
        from .pictures import cache_growth, save

        with one_line(parser, f"cannot save {args.save}"):
            save(cache_growth(found), args.save)
    return status


# "headkv" takes shares as well.
_TIMED = [name for name in ALLOCATIONS if name != "headkv"]


def add_parsers(commands: Any) -> dict[str, argparse.ArgumentParser]:
    """The parsers of all commands, with examples in their help."""
    found = {}

    def add(name: str, what: str, example: str, *, tokens: int = 0) -> argparse.ArgumentParser:
        parser = found[name] = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"example: python -m ckv_compile {name} {example}",
        )
        parser.add_argument("--model", help=f"folder or hub name; default: {SMOLLM2}, from a wheel")
        parser.add_argument("--json", action="store_true", help="print plain data on stdout")
        if tokens:
            parser.add_argument("--text", type=Path, help="UTF-8 file; default: pydoc's topics")
            parser.add_argument("--tokens", type=int, default=tokens, help=f"default {tokens}")
        return parser

    one = add("explain", "show what the pass finds in a model", "--budget 0.2", tokens=64)
    one.add_argument("--budget", default="0.2", help="default 0.2")

    one = add(
        "perturb",
        "measure how far each method moves each head's output",
        "--tokens 1536 --budgets 0.1 0.2 --save report.html",
        tokens=1024,
    )
    _compared(one, ["0.025", "0.05", "0.1", "0.2", "0.4"])
    one.add_argument("--queries", type=int, help="measure the last so many; default: the window")
    one.add_argument("--later", type=int, default=0, help="so many last tokens are not cut")
    one.add_argument("--rows", type=Path, help="JSON lines, written layer by layer")
    one.add_argument("--save", type=Path, help="report.html, report.json or picture.png")

    one = add(
        "eval",
        "ask about long texts over the full cache and over cut ones",
        "--task single multikey --samples 5 --budgets 0.2 0.5",
    )
    one.add_argument("--task", nargs="+", default=["single"], help=", ".join(TASKS))
    _compared(one, ["0.2", "0.5"])
    one.set_defaults(budgets=None, methods=None)  # they depend on the options that follow
    one.add_argument(
        "--all-methods",
        action="store_true",
        help="every method with uniform, adakv and global shares where it takes them; --budgets "
        "is then 0.05 0.1 0.2 0.4",
    )
    one.add_argument("--lengths", nargs="+", type=int, default=[1024], help="tokens; default 1024")
    one.add_argument("--settings", nargs="+", default=list(SETTINGS), help="default: both")
    one.add_argument("--samples", type=int, default=10, help="of each task; default 10")
    one.add_argument("--first-sample", type=int, default=0, help="the seed of the first")
    one.add_argument("--results", type=Path, default=Path("eval.jsonl"), help="read and extended")
    one.add_argument("--show", action="store_true", help="ask nothing, tell what --results holds")
    one.add_argument("--wide", action="store_true", help="a row for each method")
    one.add_argument(
        "--timings", type=Path, metavar="JSON", help="of bench --json, for the --wide table"
    )
    one.add_argument("--over-tasks", action="store_true", help="one row for all tasks together")
    one.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    one.add_argument("--save", type=Path, metavar="PNG", help="budget curves")

    one = add(
        "headscores",
        'measure how far back each head looks, for allocation="headkv"',
        "--text mine.txt --tokens 2048 --save heads.json",
        tokens=1024,
    )
    headscores.add_arguments(one)

    one = add("study", "run a study of the method", "epsilon --tokens 1536")
    one.add_argument("name", choices=studies.STUDIES)
    one.add_argument("--tokens", type=int, default=1536, help="of each text; default 1536")
    one.add_argument("--results", type=Path, default=Path("study.jsonl"), help="written anew")
    one.add_argument("--markdown", action="store_true", help="print tables as Markdown")

    one = add(
        "bench",
        "time a prompt and its next tokens, and weigh the cache, at each budget",
        "--tokens 2048 --budgets 0.5 0.2",
        tokens=1024,
    )
    one.add_argument("--budgets", nargs="+", default=["0.5", "0.2"], help="default 0.5 0.2")
    one.add_argument("--method", default="criticalkv")
    one.add_argument(
        "--allocation", nargs="+", default=["uniform"], choices=_TIMED, help="default uniform"
    )
    one.add_argument("--lowering", default="auto", help="auto (compiles for minutes) or eager")
    one.add_argument("--repeats", type=int, default=3)
    one.add_argument("--new-tokens", type=int, default=16, help="generated each time; default 16")
    one.add_argument("--save", type=Path, metavar="PNG", help="cache bytes over the generation")
    return found


def _compared(parser: argparse.ArgumentParser, budgets: list[str]) -> None:
    parser.add_argument(
        "--budgets", nargs="+", default=budgets, help=f"default {' '.join(budgets)}"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["snapkv", "criticalkv"],
        metavar="METHOD",
        help="criticalkv, snapkv, or with options: criticalkv:epsilon=0,norm=l2; the first one is "
        "what the others are compared with",
    )
