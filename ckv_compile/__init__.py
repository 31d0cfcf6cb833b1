"""KV-cache eviction inserted by the compiler: CriticalKV for any traced PyTorch model."""

from .api import explain, optimize, restore
from .config import Budget, EvictionConfig
from .report import Report
from .site import AttentionSite, Projection, Reason, Rejection

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "Budget",
    "EvictionConfig",
    "Projection",
    "Reason",
    "Rejection",
    "Report",
    "explain",
    "optimize",
    "restore",
]
