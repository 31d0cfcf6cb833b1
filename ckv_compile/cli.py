"""``python -m ckv_compile``, or ``ckv``: what there is to run from a shell."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit status.

    0: done; 1: done, and something is wrong with what was looked at; 2: wrong arguments, or a
    model or text that cannot be read; 130: interrupted, and what was written so far is valid.
    """
    try:
        from .evidence import commands as evidence
        from .evidence import demo
        from .evidence.shell import Parser
    except ModuleNotFoundError as error:
        if error.name != "rich":
            raise
        print(
            "ckv: error: the commands take rich: pip install 'ckv-compile[eval]'", file=sys.stderr
        )
        return 2

    parser = Parser(prog="ckv", description="KV-cache eviction inserted by the compiler.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = evidence.add_parsers(commands)
    parsers["demo"] = commands.add_parser(
        "demo",
        help="find a fact in a long text",
        description=demo.__doc__,
        epilog="example: python -m ckv_compile demo --budget 0.2 --lowering eager",
    )
    demo.add_arguments(parsers["demo"])
    parsers["coverage"] = _coverage_parser(commands)
    args = parser.parse_args(argv)
    chosen = parsers[args.command]
    if args.command == "coverage":
        return _coverage(args, chosen)
    if args.command == "demo":
        demo.run(chosen, args)
        return 0
    return evidence.run(args.command, chosen, args)


def _coverage_parser(commands: Any) -> argparse.ArgumentParser:
    coverage = commands.add_parser(
        "coverage",
        help="check every architecture of the installed transformers",
        description="Check every architecture of the installed transformers as a tiny random "
        "model, each in a process of its own. An interrupted run goes on where it was.",
        epilog="example: python -m ckv_compile coverage --only llama gpt2",
    )
    coverage.add_argument(
        "--results", type=Path, default=Path("coverage.jsonl"), help="JSON lines, read and extended"
    )
    coverage.add_argument("--page", type=Path, help="write the table to this Markdown file")
    coverage.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types")
    coverage.add_argument(
        "--timeout", type=int, default=300, metavar="S", help="seconds for one (default 300)"
    )
    coverage.add_argument(
        "--retry", action="store_true", help="check again whatever was not right before"
    )
    return coverage


def _coverage(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from .coverage.check import WRONG
    from .coverage.runner import run, summary

    try:
        results = run(
            args.results, args.page, only=args.only, timeout_s=args.timeout, retry=args.retry
        )
    except ValueError as error:
        parser.error(str(error))
    for what, number in summary(results).items():
        print(f"{number:4d}  {what}")
    return int(any(result.status == WRONG for result in results))
