"""The ``criticalkv`` backend of ``torch.compile``: rewrite the graph, then lower what is left."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from .config import EvictionConfig
from .passes import vocabulary as vocab
from .passes.axes import chain_above
from .passes.decode_attention import attend_few_queries
from .passes.insert import row_bytes
from .passes.match import dotted, example_inputs_require_grad
from .passes.matvec import spell_out_rows
from .passes.pipeline import Rewritten, rewrite
from .passes.regions import share_regions
from .report import Report, Traced, report_of
from .site import AttentionSite, Projection, Reason

log = logging.getLogger("ckv_compile")

Compiled = Callable[..., Any]
LatePass = Callable[[torch.fx.Graph], int]


def criticalkv(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Compiled:
    """``torch.compile(model, backend="criticalkv", options={...})``.

    Args:
        options: the fields of :class:`ckv_compile.EvictionConfig`; none of them means a budget of
            0.2.

    Raises:
        TypeError, ValueError: for an option that is unknown or out of range.
    """
    config = EvictionConfig.from_options(options)
    compiled, report = compile_graph(gm, example_inputs, config)
    if counts_by_length(report) and not config.budget.keeps_everything:  # type: ignore[union-attr]
        log.warning("%s", COUNTS_BY_LENGTH)
    if "budget" not in (options or {}) and report.evicted:
        log_default_budget()
    return compiled


COUNTS_BY_LENGTH = (
    "the model takes a cut cache for a whole one: it takes positions from the cache's length, or "
    "compares positions with slots of the cache in a mask. Pass the positions of new tokens in, "
    "and make masks of the lengths of q and k; explain(model) names the layers"
)


def counts_by_length(report: Report) -> bool:
    """Whether tokens that follow a cut would stand in wrong places."""
    return any(row.reason == Reason.POSITIONS.name for row in report.rejections)


def log_default_budget() -> None:
    """Nobody should lose entries to a default that they have not heard of."""
    log.warning("no budget was given: it is 0.2, a fifth of each prompt is kept")


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    config: EvictionConfig,
    *,
    training: bool = False,
    counted: bool = False,
) -> tuple[Compiled, Report]:
    """Rewrite one Dynamo graph and lower it; the report is made anew on a cache hit as well.

    Args:
        counted: cut only where the graph itself holds the budget of what it caches.
    """
    grad_enabled = example_inputs_require_grad(example_inputs)
    rewritten = rewrite(gm, config, training=training, grad_enabled=grad_enabled, counted=counted)
    report = report_of_graph(rewritten, config)
    log.info("%s", report.summary())
    for row in report.rejections:
        log.info("left alone: %s: %s: %s", row.site, row.reason, row.detail)
    log.debug("%s", gm.graph)
    return _lowered(gm, example_inputs, config, grad_enabled), report


def lowering_for(config: EvictionConfig) -> str:
    """The lowering, with "auto" resolved."""
    return "inductor" if config.lowering == "auto" else config.lowering


def _lowered(
    gm: GraphModule, example_inputs: Sequence[Any], config: EvictionConfig, grad_enabled: bool
) -> Compiled:
    lowering = lowering_for(config)
    if lowering == "eager":
        return gm.forward
    if lowering == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, example_inputs)
    from torch._inductor.compile_fx import compile_fx

    # Not where gradients are asked for: that graph is not ours to change.
    if config.share_regions and not grad_enabled:
        log.info("%d stretches of layers share their code", share_regions(gm))
    late = () if grad_enabled else _late_passes(config)
    patches = {**_mode_patches(gm, config.mode), **_inductor_patches(gm, late)}
    return compile_fx(gm, example_inputs, config_patches=patches)


def _mode_patches(gm: GraphModule, mode: str) -> dict[str, Any]:
    """Inductor's own settings for a mode of ``torch.compile``."""
    from torch._inductor import list_mode_options

    options = dict(list_mode_options(mode))
    if any(
        name.startswith(("ckv_evict_", "ckv_pack_", "ckv_fastgen_"))
        for name, _ in gm.named_children()
    ):
        # One recording for each prompt length would cost more than it saves.
        options.pop("triton.cudagraphs", None)
    return options


def _late_passes(config: EvictionConfig) -> tuple[LatePass, ...]:
    """What is rewritten in ATen, just before Inductor lowers it."""
    if not config.rewrite_products:
        return ()
    # A mode that looks for the fastest kernels looks for those of products, too.
    rows = (spell_out_rows,) if config.mode == "default" else ()
    return (attend_few_queries, *rows)


def _inductor_patches(gm: GraphModule, late: Sequence[LatePass]) -> dict[str, Any]:
    """Make Inductor's and AOTAutograd's caches know what our nodes compute, and run late passes.

    An inserted module is part of the cached graph by its name alone: without this, a changed body
    in a new process would be answered with the code of the old one.

    Args:
        late: what is called with the graph in ATen.
    """
    from torch._inductor import config as inductor_config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class OurPass(CustomGraphPass):
        """Its uuid is part of the cache key."""

        def __init__(self, key: str) -> None:
            self.key = key

        def __call__(self, graph: torch.fx.Graph) -> None:
            for rewrite_late in late:
                rewrite_late(graph)

        def uuid(self) -> str:
            return self.key

    bodies = [f"{name}: {m!r}" for name, m in gm.named_children() if name.startswith("ckv_")]
    if not bodies and not late:
        return {}
    parts = [source_digest(), *(f"late: {one.__name__}" for one in late), *bodies]
    mine = OurPass(hashlib.sha256("\n".join(parts).encode()).hexdigest())
    theirs = inductor_config.post_grad_custom_pre_pass
    if theirs is None:
        return {"post_grad_custom_pre_pass": mine}
    others = theirs if isinstance(theirs, (list, tuple)) else [theirs]
    return {"post_grad_custom_pre_pass": [*others, mine]}


def source_digest() -> str:
    """A hash of every source file of this package."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def report_of_graph(
    rewritten: Rewritten, config: EvictionConfig, names: Mapping[str, str] | None = None
) -> Report:
    """What was found in one graph, for people; ``names``: parameters' paths by their inputs."""
    folded = {site.index for site in rewritten.folded}
    evictions = {one.site.index: one for one in rewritten.inserted}

    def describe(site: AttentionSite) -> Traced:
        eviction = evictions.get(site.index)
        kept, budget_from, before = site.kv_len, "", 0
        if eviction is not None:
            kept, before = eviction.entries, eviction.before
            budget_from = "config" if eviction.module.from_config else "input"
        return Traced(
            batch_size=_size(site.batch_size),
            kv_len=_size(site.kv_len + before),
            kept=_size(kept),
            row_bytes=row_bytes(site),
            weight=_source_of(site.projection, names or {}),
            cache=_cache_of(site),
            budget_from=budget_from,
            folded=site.index in folded,
        )

    return report_of(rewritten.sites, rewritten.rejections, config, describe)


def _cache_of(site: AttentionSite) -> str:
    if not site.key_outputs:
        return "written in place"
    if site.latent:
        return "latent, returned"
    return "cat, returned" if vocab.is_cat(site.cache_key) else "returned"


def _source_of(projection: Projection | None, names: Mapping[str, str]) -> str:
    """The path of its weight in the model."""
    if projection is None:
        return ""
    root = chain_above(projection.matrix.weight)[-1]
    source = getattr(root.meta.get("grapharg"), "source", None)
    if source is None:
        return names.get(root.name, root.name)
    return dotted(source.name if isinstance(source.name, str) else source.name())


def _size(size: Any) -> int:
    """A size of the traced call: the number itself, or what a symbol stood for."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    return size if isinstance(size, int) else int(optimization_hint(size, fallback=0))
