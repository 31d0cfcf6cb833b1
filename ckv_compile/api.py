"""The public verbs: optimize, restore, explain, compress."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .backend import log_default_budget
from .budget import Budget
from .config import EvictionConfig
from .export import explain_program, optimize_program
from .policies import POLICIES, Policies, kinds_of
from .region import Region
from .report import Report
from .runtime import OptimizedForward

if TYPE_CHECKING:
    from .cache import EvictedCache


Model = TypeVar("Model", bound=nn.Module | ExportedProgram)
# What only a running model has: an exported program is one graph, lowered elsewhere.
_NOT_FOR_PROGRAMS = (
    "later_turns",
    "rewrite_gqa",
    "rewrite_products",
    "share_regions",
    "lowering",
    "mode",
)


def optimize(
    model: Model, budget: float | int | str | Budget | None = None, **options: Any
) -> Model:
    """Compile ``model`` in place so that every prefill leaves a cache cut to ``budget``.

    ``model(...)`` and ``model.generate(...)`` then run the compiled forward. Another call with
    another budget costs no second compile where only the budget changes.

    Args:
        model: a causal language model in eval mode, on any device, wrapped by PEFT or not; or a
            prefill as a :class:`torch.export.ExportedProgram`, which stays as it is: a new program
            is returned.
        budget: share, token count, expression or bytes, see :class:`ckv_compile.Budget`; 0.2 if
            none is given, which the first compile then says in the log.
        **options: the other fields of :class:`ckv_compile.EvictionConfig`; for a program not
            ``later_turns``, ``rewrite_gqa``, ``rewrite_products``, ``share_regions``, ``lowering``
            and ``mode``.
            ``tokenizer`` is for ``method="fastgen"``, which takes no budget.

    Returns:
        The same model, or a new program.

    Raises:
        TypeError, ValueError: naming the argument and what it takes.
    """
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise TypeError(
            f"model is a {type(model).__name__}; optimize takes an nn.Module or an ExportedProgram"
        )
    given = {} if budget is None else {"budget": budget}
    if "tokenizer" in options:
        options = {**options, "token_kinds": kinds_of(options["tokenizer"])}
        del options["tokenizer"]
    config = EvictionConfig.from_options({**given, **options})
    if config.chooses_policies and budget is not None:
        raise ValueError(
            f"budget={budget!r} with method='fastgen', which takes none: recovery= says how much "
            f"attention each head is to keep"
        )
    if isinstance(model, ExportedProgram):
        if config.chooses_policies:
            raise ValueError("method='fastgen' is for a model that runs, and keeps a cache of ours")
        for name in _NOT_FOR_PROGRAMS:
            if name in options:
                raise ValueError(
                    f"{name}={options[name]!r} is for a model that runs; an ExportedProgram takes "
                    f"none of {', '.join(_NOT_FOR_PROGRAMS)}"
                )
        program, report = optimize_program(model, config)
        if budget is None and report.evicted:
            log_default_budget()
        return program
    called = _called(model)
    previous = _optimized(called)
    if previous is not None and _same_code(previous, config):
        region = previous.region
    else:
        default = budget is None and not config.chooses_policies
        region = Region(called, config, default_budget=default)
    called._compiled_call_impl = OptimizedForward(called, config, region)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``optimize``: the model runs as it was written. Returns the model."""
    called = _called(model)
    if _optimized(called) is not None:
        called._compiled_call_impl = None
    return model


def explain(
    model: nn.Module | ExportedProgram,
    *args: Any,
    config: EvictionConfig | None = None,
    **inputs: Any,
) -> Report:
    """What the pass would do to ``model(*args, **inputs)``; the model is not changed.

    Traces the call, without gradients, and runs it once uncompiled: a cache that is passed in is
    filled as by any call. Without inputs, the report of all that an optimised model has compiled.

    Args:
        model: a model; or an exported program, which needs no inputs and is not run.
        config: options; by default those of an optimised model, or the defaults.
        **inputs: what ``model`` is called with.

    Raises:
        ValueError: there are no inputs and the model is not optimised; or there are inputs for an
            exported program, or it is optimised already.
    """
    if isinstance(model, ExportedProgram):
        if args or inputs:
            raise ValueError("explain takes no inputs for an ExportedProgram, which is one graph")
        return explain_program(model, config or EvictionConfig())
    model = _called(model)
    optimized = _optimized(model)
    if not args and not inputs:
        if optimized is None:
            raise ValueError(
                "explain needs the model's inputs, such as input_ids=...; "
                "only an optimised model can be explained without"
            )
        return optimized.report
    if config is None:
        config = optimized.config if optimized else EvictionConfig()
    config = dataclasses.replace(config, lowering="eager")
    # What optimize would put in front of the model, so that masks and caches are read alike.
    traced = OptimizedForward(model, config, Region(model, config), explains=True)
    with torch.no_grad():
        traced.run(*args, **inputs)
    return traced.report


def compress(
    model: nn.Module, context_ids: Tensor, attention_mask: Tensor | None = None
) -> EvictedCache:
    """Read a context once and keep its cut cache, before any question is known.

    Answer each question on a copy, or crop the answer off again::

        cache = ckv_compile.compress(model, context_ids)
        ids = torch.cat([context_ids, question_ids], dim=1)
        model.generate(ids, past_key_values=copy.deepcopy(cache))

    Args:
        model: an optimised transformers model.
        context_ids: ``[B, n]`` token ids.
        attention_mask: ``[B, n]``, 0 at pads; needed for a padded batch alone.

    Raises:
        ValueError: the model is not optimised, or makes no cache that can be cut.
    """
    model = _called(model)
    optimized = _optimized(model)
    if optimized is None:
        raise ValueError("the model is not optimised; call ckv_compile.optimize(model) first")
    from . import cache as room

    cache = room.cache_for(model)
    if not isinstance(cache, room.EvictedCache):
        raise ValueError(f"a {type(model).__name__} makes no cache that can be cut on its own")
    inputs = {"input_ids": context_ids, "attention_mask": attention_mask}
    # Of the logits, which nobody reads, one row is enough.
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    with torch.no_grad():
        model(**inputs, past_key_values=cache, use_cache=True)
    room.finish_prompt(cache)
    cache.fingerprint = room.fingerprint_of(model)
    return cache


def policies(cache: Any) -> Policies:
    """Which head got which policy of ``method="fastgen"``.

    Args:
        cache: what an optimised model has filled, with a prompt of two tokens or more.

    Raises:
        ValueError: its heads have none.
    """
    from . import cache as room

    own = room.self_attention_of(cache)
    chosen = [] if own is None else room.policies_of(own)
    if not chosen:
        raise ValueError("no head of this cache has a policy; method='fastgen' gives them")
    return Policies(
        tuple(tuple(tuple(POLICIES[policy] for policy in row) for row in layer) for layer in chosen)
    )


def _called(model: nn.Module) -> nn.Module:
    """The module that ``model(...)`` and ``model.generate(...)`` both call.

    A wrapper of PEFT leaves ``generate`` to the model inside, which calls itself: compiled around
    the wrapper, nothing that is generated would be evicted.
    """
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model


def _optimized(model: nn.Module) -> OptimizedForward | None:
    current = model._compiled_call_impl
    return current if isinstance(current, OptimizedForward) else None


def _same_code(previous: OptimizedForward, config: EvictionConfig) -> bool:
    """Whether ``config`` can run on what was compiled: only what no graph holds differs."""
    now = previous.config
    held = [f.name for f in dataclasses.fields(config) if f.name not in ("budget", "later_turns")]
    same = all(getattr(config, name) == getattr(now, name) for name in held)
    return same and not previous.region.bakes_budget
