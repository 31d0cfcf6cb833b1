"""``python -m ckv_compile``: what there is to run from a shell."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ckv_compile", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    coverage = commands.add_parser(
        "coverage",
        help="check every architecture of the installed transformers",
        description="Check every architecture of the installed transformers as a tiny random "
        "model, each in a process of its own. An interrupted run goes on where it was.",
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
    args = parser.parse_args(argv)
    return _coverage(args, parser)


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
