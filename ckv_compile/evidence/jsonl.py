"""JSON lines that an interruption spares: what is written is whole, and is not done twice."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def read_lines(path: Path | None) -> list[Any]:
    """What a file holds; a last line that was cut off in the middle is taken out of it.

    A name that ends in ``.gz`` is that of a file that gzip has packed, to be read alone.
    """
    if path is None or not path.exists():
        return []
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return [json.loads(line) for line in file]
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def append_lines(path: Path, lines: Iterable[Any]) -> None:
    if path.suffix == ".gz":
        raise ValueError(f"{path} is packed: it can be read, not extended")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


class Steps:
    """The finished steps of a long work, in a file that lies there until all of it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {json.dumps(line["step"]): line["result"] for line in read_lines(path)}

    def take(self, step: Any, compute: Callable[[], Any]) -> Any:
        """The plain data that ``compute`` makes, now or in an earlier run.

        Args:
            step: plain data that says all that the result depends on.
        """
        key = json.dumps(step)
        if key not in self.done:
            result = compute()
            append_lines(self.path, [{"step": step, "result": result}])
            self.done[key] = result
        return self.done[key]

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)
        self.done.clear()
