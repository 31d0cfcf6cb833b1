"""KV-cache eviction inserted by the compiler: CriticalKV for any traced PyTorch model."""

from typing import Any

from .api import compress, explain, optimize, policies, restore
from .budget import Budget
from .config import EvictionConfig
from .methods.base import ScoreInputs, Scores
from .policies import Policies, TokenKinds
from .registry import register_method
from .report import Report
from .site import AttentionSite, Projection, Reason, Rejection

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "Budget",
    "EvictedCache",
    "EvictionConfig",
    "Policies",
    "Projection",
    "Reason",
    "Rejection",
    "Report",
    "ScoreInputs",
    "Scores",
    "TokenKinds",
    "compress",
    "explain",
    "optimize",
    "perturbation",
    "policies",
    "register_method",
    "restore",
]


def __getattr__(name: str) -> Any:
    # EvictedCache is a transformers cache: loaded when it is asked for, not on import.
    if name == "EvictedCache":
        from .cache import EvictedCache

        return EvictedCache
    # A tool beside the library, which loads transformers as well.
    if name == "perturbation":
        from .evidence.perturbation import perturbation

        return perturbation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
