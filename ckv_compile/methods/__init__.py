"""Scoring methods, one file each; ``METHODS`` maps the option's value to its function."""

from __future__ import annotations

from collections.abc import Callable

from .base import ScoreInputs, Scores
from .criticalkv import criticalkv
from .snapkv import snapkv

METHODS: dict[str, Callable[[ScoreInputs], Scores]] = {
    "criticalkv": criticalkv,
    "snapkv": snapkv,
}
