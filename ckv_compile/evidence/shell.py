"""What the commands share: errors in one line, progress on stderr, models and texts by name."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NoReturn

from ..budget import Budget, number_in
from .candidates import Candidate, Spec, candidates_of
from .variants import VARIANTS, variant

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C has ended


class Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@contextlib.contextmanager
def one_line(parser: argparse.ArgumentParser, about: str = "") -> Iterator[None]:
    """Whatever goes wrong inside ends the program with one line and status 2."""
    try:
        yield
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        parser.error(f"{about}: {first}" if about else first)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; call it with the number of the step that begins, all, its name."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def step(number: int, total: int, name: str) -> None:
            progress.update(task, description=name, completed=number, total=total)
            if not console.is_terminal:
                console.print(f"{number} of {total}: {name}", highlight=False)

        yield step


def loaded(parser: argparse.ArgumentParser, name: str | None) -> tuple[Any, Any]:
    """``(model, tokenizer)``, quietly."""
    with one_line(parser, f"cannot load {name or 'the default model'}"):
        from .models import load

        quiet()
        return load(name)


def quiet() -> None:
    """No progress bars and no advice of transformers'."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def text_from(parser: argparse.ArgumentParser, path: Path | None) -> str:
    """A UTF-8 file; by default pages of Python's documentation."""
    if path is None:
        return "\n".join(topics[name] for name in ("execmodel", "import", "naming", "compound"))
    with one_line(parser, "cannot read --text"):
        return path.read_text(encoding="utf-8")


def budgets_from(parser: argparse.ArgumentParser, specs: Sequence[str]) -> tuple[Spec, ...]:
    with one_line(parser):
        return tuple(Budget(spec).spec for spec in specs)


def methods_from(
    parser: argparse.ArgumentParser, names: Sequence[str], **options: Any
) -> tuple[Candidate, ...]:
    """``criticalkv`` or ``criticalkv:epsilon=0,norm=l2``, each under the name as it was typed.

    The variants of the studies are known as well, and take the same options.
    """
    with one_line(parser):
        return candidates_of([_candidate(name, options) for name in names])


def _candidate(name: str, options: dict[str, Any]) -> Candidate:
    method, _, rest = name.partition(":")
    given: dict[str, Any] = {
        key: number_in(value) for key, _, value in (p.partition("=") for p in rest.split(",") if p)
    }
    if method in VARIANTS:
        return variant(name, VARIANTS[method], **options, **given)
    return variant(name, **options, **given, method=method)
