"""Projections that are more than one linear layer: adapters, quantised weights, and look-alikes."""

from __future__ import annotations

import capture
import pytest
import torch
import torch.nn.functional as F
from capture import HEADS, HIDDEN, KV_HEADS, attention, captured, qkv
from torch.utils._pytree import tree_map

from ckv_compile.config import EvictionConfig
from ckv_compile.kernels import reference
from ckv_compile.passes.pipeline import rewrite
from ckv_compile.site import Reason

CONFIG = EvictionConfig(budget=7, window_size=3, kernel_size=3, first_stage_ratio=0.0)
RANK = 4


def randn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Large beside W_O, so that scores without it would keep other entries.
A, B = randn(RANK, HIDDEN, seed=3) * 2, randn(HIDDEN, RANK, seed=4) * 2
A1, B1 = randn(1, HIDDEN, seed=5) * 4, randn(HIDDEN, 1, seed=6) * 4
FULL, BIAS, GATE = randn(HIDDEN, HIDDEN, seed=7) * 3, randn(HIDDEN), randn(HIDDEN).sigmoid()


def lora(x, a=A, b=B):
    return F.linear(F.linear(x, a), b)


def conv1d(x, w):
    """GPT-2's, which flattens the tokens for itself."""
    return torch.addmm(BIAS, x.view(-1, HIDDEN), w).view(x.shape)


def in_place(x, w):
    result = F.linear(x, w)
    result += lora(x)
    return result


def gated(x, w):
    x = x * GATE
    return F.linear(x, w) + lora(x)


# spelling: (project, in_out, adapters as [in, out] matrices and factors)
LORA = ([A.T, B.T], [2.0])
SUMS = {
    "lora": (lambda x, w: F.linear(x, w) + lora(x) * 2.0, False, [LORA]),
    "lora first": (lambda x, w: 2.0 * lora(x) + F.linear(x, w), False, [LORA]),
    "scaled inside": (
        lambda x, w: F.linear(x, w) + F.linear(F.linear(x, A) * 2.0, B),
        False,
        [LORA],
    ),
    "divided": (lambda x, w: F.linear(x, w) + lora(x) / 0.5, False, [LORA]),
    "scaled twice": (lambda x, w: F.linear(x, w) + lora(x) * 4.0 / 2, False, [LORA]),
    "x @ A @ B": (lambda x, w: x @ w + x @ A.T @ B.T * 2.0, True, [LORA]),
    "biases": (
        lambda x, w: F.linear(x, w, BIAS) + F.linear(F.linear(x, A), B, BIAS),
        False,
        [([A.T, B.T], [])],
    ),
    "rank 1": (lambda x, w: F.linear(x, w) + lora(x, A1, B1), False, [([A1.T, B1.T], [])]),
    "dropout and casts": (
        lambda x, w: (
            F.linear(x, w) + lora(F.dropout(x, 0.1, False).double().float()) * 2.0
        ).contiguous(),
        False,
        [LORA],
    ),
    "two": (
        lambda x, w: F.linear(x, w) + lora(x) * 2.0 + lora(x, A1, B1) * -1.0,
        False,
        [LORA, ([A1.T, B1.T], [-1.0])],
    ),
    "conv1d": (lambda x, w: conv1d(x, w) + lora(x) * 2.0, True, [LORA]),
    "in place": (in_place, False, [([A.T, B.T], [])]),
    "full rank": (lambda x, w: F.linear(x, w) + F.linear(x, FULL), False, [([FULL.T], [])]),
    "computed": (lambda x, w: F.linear(x, w) + F.linear(x, B @ A), False, [([(B @ A).T], [])]),
    "gated before": (gated, False, [([A.T, B.T], [])]),
    "three matrices": (
        lambda x, w: F.linear(x, w) + F.linear(lora(x), FULL / 8),
        False,
        [([A.T, B.T, FULL.T / 8], [])],
    ),
}


def grouped(x):
    return x.repeat_interleave(HEADS // KV_HEADS, dim=1)


def inputs():
    # Values of one size each: what is kept depends on the direction in which W_O sees them.
    query, key, value = qkv(KV_HEADS)
    return query, key * 0.1, F.normalize(value, dim=-1), capture.weight()


def cut(project, *, config=CONFIG, dynamic=False, weight=None, **parts):
    """The rewritten graph of an attention, and K and V before and after."""
    query, key, value, plain = inputs()
    args = (query, key, value, plain if weight is None else weight)
    gm = captured(attention(repeat=grouped, project=project, **parts), *args, dynamic=dynamic)
    found = rewrite(gm, config)
    out = sorted(gm(*gm.meta["inputs"]), key=lambda x: x.dim())
    return found, out[-2:], (args[0], key * 2 + 0 * args[0][:, :KV_HEADS], value * 2)


def kept(query, key, value, weight, in_out, norm="l1"):
    scores = reference.window_attention(query, key, None, 3, 3)
    norms = reference.projected_norm(value, weight, in_out, HEADS, norm)
    keep = reference.select(scores, norms, 7, 3, 0.0, 1e-4)
    return reference.compact(key, value, keep)


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("project", "in_out", "adapters"), SUMS.values(), ids=SUMS)
def test_all_that_is_added_to_the_projection_is_scored(project, in_out, adapters, dynamic):
    """Scores through the base alone would keep what another model finds important."""
    found, got, (query, key, value) = cut(project, dynamic=dynamic)
    assert found.rejections == () and len(found.inserted) == 1
    (site,) = found.sites
    assert len(site.projection.adapters) == len(adapters)
    weight = capture.weight()
    whole = reference.with_adapters(weight, in_out, adapters)
    assert same(got, kept(query, key, value, whole, in_out))
    assert not same(got, kept(query, key, value, weight, in_out))


def test_a_branch_of_something_else_is_none_of_the_projection():
    """It does not move with the values."""
    other = randn(2, capture.Q_LEN, HIDDEN, seed=8)
    found, got, state = cut(lambda x, w: F.linear(x, w) + lora(other))
    assert found.sites[0].projection.adapters == ()
    assert same(got, kept(*state, capture.weight(), False))


def test_a_computed_weight_is_the_weight():
    """Dequantised in the graph, say; tied, scaled, or put together from parts."""
    found, got, state = cut(lambda x, w: F.linear(x, w * FULL))
    assert len(found.inserted) == 1
    assert same(got, kept(*state, capture.weight() * FULL, False))


# --- look-alikes


def written(x, w):
    """The base layer's result is written to, and read again under its old name."""
    result = F.linear(x, w)
    more = result
    more += lora(x)
    return more + result


def written_view(x, w):
    result = F.linear(x, w)
    flat = result.view(-1, HIDDEN)
    flat *= 2.0
    return result + lora(x)


def elsewhere(x, w):
    """The branch is added behind a norm."""
    return F.rms_norm(F.linear(x, w), (HIDDEN,)) + lora(x)


FORKS = {
    "no matrix": lambda x, w: F.linear(x, w) + x,
    "of a bend": lambda x, w: F.linear(x, w) + lora(x.relu()),
    "bent between": lambda x, w: F.linear(x, w) + F.linear(F.linear(x, A).relu(), B),
    "bent behind": lambda x, w: F.linear(x, w) + lora(x).tanh(),
    "scaled by itself": lambda x, w: F.linear(x, w) + lora(x) * x.mean(),
    "scaled by a vector": lambda x, w: F.linear(x, w) + lora(x) * GATE,
    "multiplied": lambda x, w: F.linear(x, w) * lora(x),
    "subtracted": lambda x, w: F.linear(x, w) - lora(x),
    "added by alpha": lambda x, w: torch.add(F.linear(x, w), lora(x), alpha=2),
    "gated branch": lambda x, w: F.linear(x, w) + lora(x * GATE),
    "gated base": lambda x, w: F.linear(x * GATE, w) + lora(x),
    "another token's": lambda x, w: F.linear(x, w) + lora(x.roll(1, dims=1)),
    "mixed tokens": lambda x, w: F.linear(x, w) + lora(x).cumsum(1),
    "mixed features": lambda x, w: F.linear(x, w) + F.linear(F.linear(x, A).flip(-1), B),
    "heads apart": lambda x, w: (
        F.linear(x, w) + lora(x.unflatten(-1, (HEADS, -1)).transpose(2, 3).flatten(2))
    ),
    "weight of the output": lambda x, w: F.linear(x, w * x.mean()),
    "bias of the output": lambda x, w: F.linear(x, w, x.mean((0, 1))),
    "addmm of both": lambda x, w: torch.addmm(F.linear(x, w)[0], F.linear(x[0], A), B.T),
    "residual between": lambda x, w: F.linear(x, w) + BIAS + lora(x),
    "behind a norm": elsewhere,
    "another reader": lambda x, w: F.linear(x, w) + lora(x) + x.amax(),
    "only low ranks": lambda x, w: F.linear(F.linear(x, w[:RANK]), B) + lora(x),
    "written": written,
    "written through a view": written_view,
    "cut off": lambda x, w: F.linear(x, w) + lora(x.to(torch.int64).float()),
}


@pytest.mark.parametrize("project", FORKS.values(), ids=FORKS)
def test_look_alikes_of_adapters_are_refused(project):
    """Each would be scored through a matrix that is not what the layer multiplies by."""
    found, got, (_, key, value) = cut(project)
    assert found.inserted == () and same(got, (key, value))
    (rejection,) = found.rejections
    assert rejection.reason is Reason.OUTPUT_FORKS, rejection
    assert "is used by" in rejection.detail and 'norm="value"' in rejection.cure


def test_dropout_of_an_adapter_in_training_mode_is_refused():
    found, *_ = cut(lambda x, w: F.linear(x, w) + lora(F.dropout(x, 0.0, True)))
    assert [r.reason for r in found.rejections] == [Reason.TRAINING]


def test_a_cast_to_integers_is_no_relayout():
    """The values lose their fractions before the projection sees them."""
    found, *_ = cut(lambda x, w: F.linear((x * 8).to(torch.int32).float(), w))
    assert [r.reason for r in found.rejections] == [Reason.OUTPUT_OP]
    found, *_ = cut(lambda x, w: F.linear(x.to(torch.int32).float(), w))
    assert [r.reason for r in found.rejections] == [Reason.OUTPUT_OP]


# --- weights that only their op can read


class Packed(torch.Tensor):
    """A weight kept as int8 and one scale for each output, as quantisation libraries do it."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype)

    def __init__(self, data, scale):
        self.data_, self.scale_ = data, scale

    def __tensor_flatten__(self):
        return ["data_", "scale_"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, size, stride):
        return cls(tensors["data_"], tensors["scale_"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.linear, torch.addmm):
            args, kwargs = tree_map(
                lambda x: x.plain() if isinstance(x, Packed) else x, (args, kwargs)
            )
            cls.check(args[0])
            return function(*args, **kwargs)
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].data_, args[0].scale_)
        raise NotImplementedError(f"{function} of a packed weight")

    @staticmethod
    def check(x):
        pass

    def plain(self):
        return self.data_.to(self.scale_.dtype) * self.scale_


class TokensOnly(Packed):
    """One whose op takes a batch of tokens and nothing else."""

    @staticmethod
    def check(x):
        if x.dim() != 3:
            raise ValueError("not a batch of tokens")


def packed(kind=Packed):
    weight = capture.weight()
    scale = weight.abs().amax(1, keepdim=True) / 3
    return kind((weight / scale).round().to(torch.int8), scale)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_quantised_weight_is_read_by_what_its_op_does(dynamic):
    """Its own numbers are packed; the model does not multiply by those it was made of, either."""
    weight = packed()
    for adapters, project in (
        ([], lambda x, w: F.linear(x, w, BIAS)),
        ([([A.T, B.T], [])], lambda x, w: F.linear(x, w, BIAS) + lora(x)),
    ):
        found, got, state = cut(project, weight=weight, dynamic=dynamic)
        assert found.rejections == () and found.sites[0].projection.matrix.opaque
        whole = reference.with_adapters(weight.plain(), False, adapters)
        assert same(got, kept(*state, whole, False))
        assert not same(got, kept(*state, capture.weight(), False))


@pytest.mark.parametrize(
    ("project", "kind"),
    [
        (lambda x, w: torch.addmm(BIAS, x.flatten(0, 1), w), Packed),
        (F.linear, TokensOnly),
    ],
    ids=["addmm", "no identity"],
)
def test_a_quantised_weight_that_cannot_be_read_is_refused(project, kind):
    found, got, (_, key, value) = cut(project, weight=packed(kind))
    assert found.inserted == () and same(got, (key, value))
    assert [r.reason for r in found.rejections] == [Reason.OUTPUT_OP]


# --- scores without a projection

UNPROJECTED = {
    "normed": lambda x, w: F.linear(F.rms_norm(x, (HIDDEN,)), w),
    "forked": lambda x, w: F.linear(x, w) + x.relu(),
    "none": lambda x, w: x,
    "quantised activations": lambda x, w: F.linear((x * 9).round() / 9, w),
}


@pytest.mark.parametrize("options", [{"norm": "value"}, {"method": "snapkv"}], ids=str)
@pytest.mark.parametrize("project", UNPROJECTED.values(), ids=UNPROJECTED)
def test_scores_that_see_no_projection_need_none(project, options):
    """The norm of the value alone, or no norm: nothing behind the attention has to be read."""
    config = EvictionConfig(budget=7, window_size=3, kernel_size=3, first_stage_ratio=0, **options)
    assert cut(project)[0].inserted == ()
    found, got, (query, key, value) = cut(project, config=config)
    assert found.rejections == () and len(found.inserted) == 1
    norm = reference.projected_norm(value, None, False, HEADS, "value")
    norm = None if options.get("method") == "snapkv" else norm
    scores = reference.window_attention(query, key, None, 3, 3)
    assert same(got, reference.compact(key, value, reference.select(scores, norm, 7, 3, 0.0, 1e-4)))


def test_an_unread_projection_is_not_computed():
    """A layer applied to the identity, for scores that never look at it."""
    config = EvictionConfig(budget=7, window_size=3, norm="value")
    found, *_ = cut(F.linear, config=config, weight=packed())
    graph = found.inserted[0].node.graph
    assert found.sites[0].projection is not None
    assert not any(node.target is torch.eye for node in graph.nodes)


def test_training_is_refused_without_a_projection_as_well():
    config = EvictionConfig(budget=7, window_size=3, norm="value")
    found, *_ = cut(lambda x, w: F.linear(F.dropout(x, 0.0, True), w), config=config)
    assert [r.reason for r in found.rejections] == [Reason.TRAINING]
