"""The theorem that CriticalKV rests on (arXiv 2502.03805), as inequalities over random heads.

Per query and head, with ``A`` a softmax row as the score, ``r_i = ||v_i W_O||_1``, no pooling and
epsilon 0. Keeping the set ``N`` renormalises ``A`` by ``sigma = sum_N A_i``, and

    ||o - o_N||_1 <= theta = C - (2 - 1/sigma) * sum_N A_i r_i,    C = sum_i A_i r_i.

``theta_hat`` is theta with sigma frozen at what stage 1 reached. CriticalKV's set has the least
theta_hat of all sets of its size that contain stage 1's. ``theta`` itself is *not* guaranteed to be
lower than that of attention alone, which collects the larger sigma: the last test has a head where
it is higher.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckv_compile.kernels import reference
from ckv_compile.kernels.select import select as traced_select

SETTINGS = settings(deadline=None, max_examples=150)
Select = Callable[..., Tensor]
SELECTIONS = pytest.mark.parametrize(
    "select", [reference.select, traced_select], ids=["reference", "traced"]
)


@dataclasses.dataclass(frozen=True)
class Head:
    """One query's attention row ``[K]`` and the projected values ``[K, E]``, float64."""

    attention: Tensor
    projected: Tensor

    @property
    def weighted_norms(self) -> Tensor:
        """``A_i ||v_i W_O||_1``, ``[K]``."""
        return self.attention * self.projected.abs().sum(-1)

    def sigma(self, kept: Sequence[int]) -> float:
        return float(self.attention[list(kept)].sum())

    def perturbation(self, kept: Sequence[int]) -> float:
        """``||o - o_N||_1``, with the output recomputed from the kept entries."""
        index = list(kept)
        whole = self.attention @ self.projected
        renormalised = self.attention[index] / self.attention[index].sum()
        return float((whole - renormalised @ self.projected[index]).abs().sum())

    def theta(self, kept: Sequence[int], sigma: float | None = None) -> float:
        """The bound; with ``sigma`` given, frozen there, it is theta_hat."""
        sigma = self.sigma(kept) if sigma is None else sigma
        terms = self.weighted_norms
        return float(terms.sum() - (2 - 1 / sigma) * terms[list(kept)].sum())


@st.composite
def heads(draw: st.DrawFn, lengths: st.SearchStrategy[int]) -> Head:
    """Flat to one-hot attention; values random, zero, one huge, or large where A is small."""
    kv_len, head_dim, hidden_size = draw(lengths), 4, draw(st.sampled_from([1, 3, 8]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    attention = (randn(kv_len) * draw(st.sampled_from([0.0, 1.0, 3.0, 10.0]))).softmax(-1)
    value = randn(kv_len, head_dim)
    kind = draw(st.sampled_from(["random", "same", "zero", "huge", "adversarial", "two-faced"]))
    if kind == "same":
        value[:] = value[0]
    if kind == "zero":
        value[::2] = 0
    if kind == "huge":
        value[draw(st.integers(0, kv_len - 1))] *= 1e6
    if kind == "adversarial":
        value /= attention[:, None].clamp(min=1e-6)
    if kind == "two-faced":
        # Opposite values: nothing of the dropped part cancels against the kept part.
        value = value[:1] * torch.where(torch.arange(kv_len) % 2 == 0, 1.0, -1.0)[:, None]
    return Head(attention, value @ randn(head_dim, hidden_size))


def with_first_stage_mass(head: Head, first: Sequence[int], mass: float) -> Head:
    """The head with at least ``mass`` of its attention on ``first``.

    Those weights only grow and the others only shrink, so the attention ranks them as before.
    """
    mass = max(mass, head.sigma(first))
    inside = torch.zeros_like(head.attention, dtype=torch.bool)
    inside[list(first)] = True
    scaled = torch.where(
        inside,
        head.attention * (mass / head.sigma(first)),
        head.attention * ((1 - mass) / (1 - head.sigma(first))),
    )
    return Head(scaled / scaled.sum(), head.projected)


def kept_by(
    select: Select, head: Head, norm: bool, budget: int, window_size: int, ratio: float
) -> list[int]:
    """Positions that the package's selection keeps, fed float32 as it is in a graph."""
    base = head.attention.float()[None, None]
    norms = head.projected.abs().sum(-1).float()[None, None] if norm else None
    return select(base, norms, budget, window_size, ratio, 0.0)[0, 0].tolist()


@settings(deadline=None, max_examples=400)
@given(heads(st.integers(1, 40)), st.data())
def test_theta_bounds_the_perturbation_of_any_kept_set(head: Head, data: st.DataObject) -> None:
    """Prevents the formula in METHODS from being misquoted: it must bound what is measured."""
    positions = st.integers(0, len(head.attention) - 1)
    kept = sorted(data.draw(st.sets(positions, min_size=1), label="kept"))
    assume(head.sigma(kept) > 1e-9)
    theta = head.theta(kept)
    # Every term of the bound is at most C or C / sigma; the rounding is a share of those.
    slack = 1e-12 * float(head.weighted_norms.sum()) * (3 + 1 / head.sigma(kept))
    assert head.perturbation(kept) <= theta + slack


@SETTINGS
@given(heads(st.integers(1, 40)))
def test_theta_of_everything_is_zero(head: Head) -> None:
    """Prevents a bound that holds only because it is loose: with nothing dropped it is exact."""
    everything = range(len(head.attention))
    scale = float(head.weighted_norms.sum())
    assert abs(head.theta(everything)) <= 1e-12 * scale
    assert head.perturbation(everything) <= 1e-12 * scale


def test_theta_is_reached() -> None:
    """Prevents a bound with a spurious factor: opposite values attain it."""
    head = Head(torch.tensor([0.7, 0.3]).double(), torch.tensor([[1.0], [-1.0]]).double())
    assert head.perturbation([0]) == pytest.approx(0.6)
    assert head.theta([0]) == pytest.approx(1 - (2 - 1 / 0.7) * 0.7) == pytest.approx(0.6)


@SELECTIONS
@SETTINGS
@given(
    head=heads(st.integers(4, 10)),
    data=st.data(),
    window_size=st.integers(1, 2),
    ratio=st.sampled_from([0.5, 0.7]),
    mass=st.floats(0.5001, 0.95),
)
def test_the_kept_set_has_the_least_theta_hat(
    select: Select, head: Head, data: st.DataObject, window_size: int, ratio: float, mass: float
) -> None:
    """Prevents a second stage that ranks by the norm or the attention alone, or ranks upwards."""
    kv_len = len(head.attention)
    budget = data.draw(st.integers(window_size + 1, kv_len - 1), label="budget")
    first_size = max(int(ratio * budget), window_size)
    first = kept_by(select, head, False, first_size, window_size, ratio)
    assume(1e-6 < head.sigma(first) < 1 - 1e-6)
    head = with_first_stage_mass(head, first, mass)
    assert kept_by(select, head, False, first_size, window_size, ratio) == first
    sigma = head.sigma(first)
    assert sigma > 0.5

    critical = kept_by(select, head, True, budget, window_size, ratio)
    assert set(first) <= set(critical)
    rest = [i for i in range(kv_len) if i not in first]
    others = itertools.combinations(rest, budget - first_size)
    least = min(head.theta([*first, *more], sigma) for more in others)
    # The package ranks in float32.
    slack = 1e-6 * float(head.weighted_norms.sum())
    assert head.theta(critical, sigma) <= least + slack
    attention_only = kept_by(select, head, False, budget, window_size, ratio)
    assert set(first) <= set(attention_only)
    assert head.theta(critical, sigma) <= head.theta(attention_only, sigma) + slack


@SELECTIONS
@SETTINGS
@given(head=heads(st.integers(4, 60)), data=st.data(), mass=st.floats(0.5001, 0.95))
def test_theta_hat_is_above_theta_and_the_perturbation(
    select: Select, head: Head, data: st.DataObject, mass: float
) -> None:
    """Prevents minimising what bounds nothing: freezing sigma must only loosen the bound."""
    budget = data.draw(st.integers(2, len(head.attention) - 1), label="budget")
    first_size = max(budget // 2, 1)
    first = kept_by(select, head, False, first_size, 1, 0.5)
    assume(1e-6 < head.sigma(first) < 1 - 1e-6)
    head = with_first_stage_mass(head, first, mass)
    critical = kept_by(select, head, True, budget, 1, 0.5)
    slack = 1e-11 * float(head.weighted_norms.sum())
    theta_hat, theta = head.theta(critical, head.sigma(first)), head.theta(critical)
    assert theta_hat >= theta - slack
    assert theta >= head.perturbation(critical) - slack


def test_theta_of_attention_alone_can_be_lower() -> None:
    """Prevents the claim, in code or prose, that CriticalKV's theta is always the lower one."""
    norms = torch.tensor([1.0, 1.0, 1.0, 4.5, 4.5, 1.0]).double()
    head = Head(torch.tensor([0.5, 0.2, 0.2, 0.045, 0.045, 0.01]).double(), norms[:, None])
    critical = kept_by(reference.select, head, True, 4, 1, 0.5)
    attention_only = kept_by(reference.select, head, False, 4, 1, 0.5)
    assert (critical, attention_only) == ([0, 3, 4, 5], [0, 1, 2, 5])
    sigma = head.sigma([0, 5])
    assert sigma > 0.5
    assert head.theta(critical, sigma) < head.theta(attention_only, sigma)
    assert head.theta(critical) > 1.0 > 0.5 > head.theta(attention_only)
