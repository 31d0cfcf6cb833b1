"""A model under ``torch.compile``: what is traced, under which settings, and its reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .backend import (
    COUNTS_BY_LENGTH,
    Compiled,
    compile_graph,
    counts_by_length,
    log_default_budget,
)
from .config import EvictionConfig
from .passes import insert  # noqa: F401  registers the capacity marker
from .plan import Plan
from .report import Report

# Prefill, decode, later turns, each with and without padding and positions, batches of one and of
# many: more kinds of calls than Dynamo's default of 8, and past the limit nothing is evicted.
RECOMPILE_LIMIT = 32


class WrongPositionsError(RuntimeError):
    """The model counts its tokens by the length of a cache that is cut."""


class Region:
    """One model under ``torch.compile``, and the reports of the graphs it was compiled to."""

    def __init__(
        self, model: nn.Module, config: EvictionConfig, *, default_budget: bool = False
    ) -> None:
        self.config = config
        self.reports: list[Report] = []
        # Whether a running call's cache counts tokens: then only counted sites may be cut.
        self.counted = False
        # Whether a plain cache has been cut, and whether the model takes positions from its length.
        self.cuts = self.counts_by_length = False

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Compiled:
            compiled, report = compile_graph(
                gm, example_inputs, config, training=model.training, counted=self.counted
            )
            if default_budget and report.evicted and not self.reports:
                log_default_budget()
            self.reports.append(report)
            self.counts_by_length |= counts_by_length(report)
            if self.cuts and self.counts_by_length:
                raise WrongPositionsError(COUNTS_BY_LENGTH)
            return compiled

        self.call = torch.compile(_region(model), backend=backend, recompile_limit=RECOMPILE_LIMIT)

    @property
    def bakes_budget(self) -> bool:
        """Whether some compiled graph holds the budget as a constant, not as an input."""
        rows = (row for report in self.reports for row in report.sites)
        return any(row.budget_from == "config" or row.action == "keep all" for row in rows)


def _region(self: nn.Module) -> Callable[..., Any]:
    # The closure holds the model as "self", so that the paths in a report start inside it.
    def forward(plan: Plan | None, args: Any, kwargs: Any) -> Any:
        if plan is not None:
            plan.mark()
        return self._call_impl(*args, **kwargs)

    # Dynamo keeps what it has compiled by code object: two models, or two configurations of one,
    # must share neither that nor a recompile limit. Not isolate_recompiles, whose identity is the
    # whole process's in torch 2.13: a compile in another thread would take it.
    forward.__code__ = forward.__code__.replace()
    return forward


@contextlib.contextmanager
def compile_settings() -> Iterator[None]:
    """Settings that must hold while Dynamo traces, and for our calls alone."""
    from torch.fx.experimental import _config as shape_config

    with (
        # Sizes that are equal by accident (prompt length == head_dim) would cost a recompile.
        shape_config.patch(use_duck_shape=False),
        # Past the limit Dynamo runs eager without a word, that is, it stops evicting.
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        # A cache in a registered buffer grows; by default each length would be compiled anew.
        torch._dynamo.config.patch(force_parameter_static_shapes=False),
    ):
        yield
