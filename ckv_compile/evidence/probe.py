"""One uncompiled pass over a text, watched at every attention: what an eviction node would see."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..config import EvictionConfig
from ..inputs import mark_dynamic, tokens_of
from ..kernels.select import select
from ..kernels.window_attention import with_heads
from ..methods.base import ScoreInputs, Scores, scores_of
from ..passes.einsum import spell_out_einsums
from ..passes.match import match_sites
from ..passes.projections import insert_weight
from ..passes.rotation import rotation_of, turn_queries
from ..site import AttentionSite, Rejection


@dataclasses.dataclass(frozen=True)
class Remembered(ScoreInputs):
    """Score inputs that compute nothing twice, however many methods and budgets ask."""

    memo: dict[Any, Tensor] = dataclasses.field(default_factory=dict)

    def window_attention(self, kernel_size: int | None = None) -> Tensor:
        width = self.config.kernel_size if kernel_size is None else kernel_size
        compute = functools.partial(super().window_attention, width)
        return self._once(("attention", self.config.window_size, width), compute)

    def projected_norm(self) -> Tensor:
        return self._once(("norm", self.config.norm), super().projected_norm)

    def norm_to_select_by(self) -> Tensor:
        return self.projected_norm()  # made once for all budgets

    def projected_norms(self, norm: str | None = None) -> Tensor:
        key = ("norms", norm or self.config.norm)
        return self._once(key, functools.partial(super().projected_norms, norm))

    def attention_rows(self, reduce: str, *args: Any, **options: Any) -> Tensor:
        key = ("rows", self.config.window_size, reduce, args, *sorted(options.items()))
        return self._once(key, functools.partial(super().attention_rows, reduce, *args, **options))

    def layer_preference(self) -> Tensor:
        return self._once(("preference", self.config.window_size), super().layer_preference)

    def _once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]


@dataclasses.dataclass(frozen=True)
class Seen:
    """One attention while the text is read.

    ``inputs`` are what a method scores. ``cached`` are the cache's own tensors, ``[B, Hkv, K, *]``,
    one head for all where ``latent``.
    """

    name: str
    inputs: Remembered
    cached: tuple[Tensor, Tensor]
    latent: bool

    @property
    def kv_len(self) -> int:
        return self.inputs.key.shape[2]

    def prompt(self, length: int) -> Seen:
        """The same attention, had the text ended after ``length`` tokens."""
        if length == self.kv_len:
            return self
        inputs = self.inputs
        query, key, value = (x[:, :, :length] for x in (inputs.query, inputs.key, inputs.value))
        bias = None if inputs.bias is None else _cut_bias(inputs.bias, length)
        # Other positions would follow a shorter prompt.
        shorter = dataclasses.replace(
            inputs, query=query, key=key, value=value, bias=bias, expected=None, memo={}
        )
        cached = (self.cached[0][:, :, :length], self.cached[1][:, :, :length])
        return dataclasses.replace(self, inputs=shorter, cached=cached)

    def kept(self, config: EvictionConfig, budget: int) -> Tensor:
        """Positions ``[B, Hkv, budget]`` that the eviction node keeps with these options."""
        scores = self.scores(config)
        return self.selected(scores.base, scores.made_norm, config, budget)

    def scores(self, config: EvictionConfig) -> Scores:
        """What the method gives each entry, ``[B, Hkv, K]``."""
        return scores_of(config.method, dataclasses.replace(self.inputs, config=config))

    def preference(self, config: EvictionConfig) -> Tensor:
        """What the layer asks of a common budget, ``[B]``."""
        return dataclasses.replace(self.inputs, config=config).layer_preference()

    def first_stage(self, config: EvictionConfig, budget: int) -> Tensor:
        """What attention alone has chosen before values are looked at; all of it without norms."""
        scores = self.scores(config)
        if scores.norm is not None:
            ratio = config.first_stage_ratio
            budget = min(budget, max(int(ratio * budget + 1e-9), config.window_size))
        return self.selected(scores.base, None, config, budget)

    def selected(
        self, base: Tensor, norm: Tensor | None, config: EvictionConfig, budget: int
    ) -> Tensor:
        """The library's selection from scores ``[B, Hkv, K]``."""
        if self.latent:
            base = base.mean(1, keepdim=True)
            norm = None if norm is None else norm.mean(1, keepdim=True)
        stages = (config.window_size, config.first_stage_ratio, config.epsilon)
        return select(base, norm, budget, *stages)


def _cut_bias(bias: Tensor, length: int) -> Tensor:
    queries = bias.shape[2] if bias.shape[2] == 1 else length
    keys = bias.shape[3] if bias.shape[3] == 1 else length
    return bias[:, :, :queries, :keys]


Visit = Callable[[Seen], None]


class Watcher:
    """A model whose calls show every attention that can be evicted; traced once, never compiled.

    The tensors of a layer are gone when the next one runs, unless ``visit`` keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites: list[AttentionSite] = []
        self.rejections: list[Rejection] = []
        # Why the queries of a site cannot be turned to later positions.
        self.unread: dict[str, str] = {}
        self.visit: Visit = _ignore
        self._call = torch.compile(_region(model), backend=self._backend, recompile_limit=64)

    def __call__(self, visit: Visit, **inputs: Any) -> Any:
        """Run ``model(**inputs)``, a prompt on an empty cache, and show each site as it runs."""
        from torch.fx.experimental import _config as shape_config

        self.visit = visit
        mark_dynamic(tokens_of((), inputs), inputs)
        try:
            # Equal sizes by accident would cost a second trace.
            with torch.no_grad(), shape_config.patch(use_duck_shape=False):
                return self._call(inputs)
        finally:
            self.visit = _ignore

    def _backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        spell_out_einsums(gm)
        sites, rejections = match_sites(gm, training=self.model.training)
        sites = tuple(site for site in sites if site.phase == "prefill")
        read = {site.name: rotation_of(gm, site) for site in sites}
        self.unread |= {name: why for name, why in read.items() if isinstance(why, str)}
        expected = turn_queries(gm, [s for s in sites if s.name not in self.unread], "prefill")
        for site in sites:
            _insert(gm, site, self, expected.get(site.sdpa))
        gm.graph.lint()
        gm.recompile()
        known = {site.name for site in self.sites}
        self.sites += [site for site in sites if site.name not in known]
        refused = {rejection.name for rejection in self.rejections}
        self.rejections += [r for r in rejections if r.name not in refused]
        return gm.forward


def _ignore(seen: Seen) -> None:
    """Nobody is looking."""


def _region(self: nn.Module) -> Callable[..., Any]:
    # The closure holds the model as "self", so that the names of sites start inside it; the code is
    # a copy, for Dynamo keeps what it has traced by code object.
    def forward(inputs: dict[str, Any]) -> Any:
        return self._call_impl(**inputs)

    forward.__code__ = forward.__code__.replace()
    return forward


class _Probe(nn.Module):
    """A node of the graph that shows its operands and returns nothing."""

    def __init__(self, watcher: Watcher, site: AttentionSite) -> None:
        super().__init__()
        # In a tuple: a watcher holds the model, which must not become a submodule of its graph.
        self.held = (watcher,)
        self.path, self.latent = site.name, site.latent
        assert site.projection is not None
        self.in_out = site.projection.matrix.in_out

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, scale: Any, softcap: Any,
        cached: tuple[Tensor, Tensor], biases: tuple[Tensor, ...], sinks: Tensor | None,
        adapters: Any, expected: Tensor | None,
    ) -> None:  # fmt: skip
        (watcher,) = self.held
        if watcher.visit is _ignore:
            return
        heads = query.shape[1]
        inputs = Remembered(
            query, key, value, weight, self.in_out, scale, softcap,
            EvictionConfig(lowering="eager"),
            bias=sum(with_heads(bias, heads) for bias in biases) if biases else None,
            sinks=sinks, adapters=adapters, expected=expected,
        )  # fmt: skip
        watcher.visit(Seen(self.path, inputs, cached, self.latent))


def _insert(gm: GraphModule, site: AttentionSite, watcher: Watcher, expected: Node | None) -> None:
    """``ckv_probe_i(query, key, value, W_O, ..)`` behind the site's projection."""
    assert site.projection is not None
    name = f"ckv_probe_{site.index}"
    gm.add_submodule(name, _Probe(watcher, site))
    with gm.graph.inserting_before(site.projection.node.next):
        weight, adapters = insert_weight(gm.graph, site.projection)
        cached = (site.cache_key, site.cache_value)
        read = (site.key, site.value) if site.latent else cached
        biases = tuple(bias.node for bias in site.biases)
        args = (site.query, *read, weight, site.scale, site.softcap, cached, biases)
        gm.graph.call_module(name, (*args, site.sinks, adapters, expected))
