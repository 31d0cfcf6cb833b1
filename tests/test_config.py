"""Options are refused with their name and a cure, and a budget is exact for every length."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from ckv_compile.budget import Budget
from ckv_compile.config import LOWERINGS, METHODS, NORMS, EvictionConfig

SETTINGS = settings(deadline=None, max_examples=200)
# Examples of sympy cost milliseconds each.
FEW = settings(deadline=None, max_examples=60)

NAN, INF = math.nan, math.inf
SHARE = r"a float in \(0, 1\]"

REFUSED_VALUES: list[tuple[str, Any, type[Exception], str]] = [
    ("budget", 0.0, ValueError, SHARE),
    ("budget", -0.2, ValueError, SHARE),
    ("budget", 1.0001, ValueError, SHARE),
    ("budget", 40.0, ValueError, SHARE),
    ("budget", NAN, ValueError, SHARE),
    ("budget", INF, ValueError, SHARE),
    ("budget", -INF, ValueError, SHARE),
    ("budget", 0, ValueError, "an int"),
    ("budget", -1, ValueError, "an int"),
    ("budget", True, TypeError, "bool.*an int"),
    ("budget", False, TypeError, "bool.*an int"),
    ("budget", None, TypeError, "NoneType.*an int"),
    ("budget", [0.2], TypeError, "list.*an int"),
    ("budget", Fraction(1, 5), TypeError, "Fraction.*an int"),
    ("budget", b"n/2", TypeError, "bytes.*an int"),
    # The default window is always kept, so fewer tokens than it could not be honoured.
    ("budget", 1, ValueError, "window_size=32.*window_size \\+ 1"),
    ("budget", 32, ValueError, "window_size=32.*window_size \\+ 1"),
    ("budget", "32", ValueError, "window_size=32.*window_size \\+ 1"),
    ("budget", "0", ValueError, "an int"),
    ("budget", "-0.5", ValueError, SHARE),
    ("budget", "1.5", ValueError, SHARE),
    ("budget", "nan", ValueError, SHARE),
    ("budget", "inf", ValueError, SHARE),
    ("window_size", 0, ValueError, "an int >= 1"),
    ("window_size", -1, ValueError, "an int >= 1"),
    ("window_size", True, TypeError, "an int >= 1"),
    ("window_size", 32.0, TypeError, "an int >= 1"),
    ("window_size", "32", TypeError, "an int >= 1"),
    ("window_size", None, TypeError, "an int >= 1"),
    ("kernel_size", 0, ValueError, "an odd int >= 1"),
    ("kernel_size", -7, ValueError, "an odd int >= 1"),
    ("kernel_size", 6, ValueError, "an odd int >= 1"),
    ("kernel_size", True, TypeError, "an odd int >= 1"),
    ("kernel_size", 7.0, TypeError, "an odd int >= 1"),
    ("first_stage_ratio", -0.1, ValueError, r"a float in \[0, 1\]"),
    ("first_stage_ratio", 1.1, ValueError, r"a float in \[0, 1\]"),
    ("first_stage_ratio", NAN, ValueError, r"a float in \[0, 1\]"),
    ("first_stage_ratio", INF, ValueError, r"a float in \[0, 1\]"),
    ("first_stage_ratio", True, TypeError, r"a float in \[0, 1\]"),
    ("first_stage_ratio", "0.5", TypeError, r"a float in \[0, 1\]"),
    ("epsilon", -1e-4, ValueError, "a finite float >= 0"),
    ("epsilon", INF, ValueError, "a finite float >= 0"),
    ("epsilon", NAN, ValueError, "a finite float >= 0"),
    ("epsilon", False, TypeError, "a finite float >= 0"),
    ("epsilon", None, TypeError, "a finite float >= 0"),
    ("method", "h3o", ValueError, "'criticalkv', 'snapkv', 'h2o'"),
    ("method", "CriticalKV", ValueError, "'criticalkv', 'snapkv'"),
    ("method", None, TypeError, "'criticalkv', 'snapkv'"),
    ("base", "h3o", ValueError, "'snapkv', 'h2o', 'tova', 'vatp'"),
    ("base", None, TypeError, "'snapkv', 'h2o'"),
    ("base", "knorm", ValueError, "not registered as a base.* 'snapkv', 'h2o'"),
    ("base", "keydiff", ValueError, "not registered as a base.* 'snapkv', 'h2o'"),
    ("base", "streaming_llm", ValueError, "not registered as a base.* 'snapkv', 'h2o'"),
    ("base", "criticalkv", ValueError, "'snapkv', 'h2o'"),
    ("norm", "l3", ValueError, "'l1', 'l2'"),
    ("norm", 1, TypeError, "'l1', 'l2'"),
    ("lowering", "cudagraphs", ValueError, "'auto', 'inductor'"),
    ("lowering", ["eager"], TypeError, "'auto', 'inductor'"),
    ("mode", "fast", ValueError, "'default', 'reduce-overhead'"),
    ("later_turns", "drop", ValueError, "'keep', 'evict'"),
    ("rewrite_gqa", 1, TypeError, "True or False"),
    ("rewrite_products", None, TypeError, "True or False"),
    ("share_regions", "yes", TypeError, "True or False"),
]

REFUSED_EXPRESSIONS = [
    "", " ", "n/", "m/2", "N", "n**n", "n**2", "n//2", "n % 2", "n < 2", "n n", "2n", "n^2", "n!",
    "100/n", "n/0", "0/0", "n/(n-n)", "n/max(n, 100)", "max(n", "max(n, 10)(2)", "max", "max()",
    "max*n", "max(n, key=n)", "max(*n)", "floor()", "floor(n, 2)", "floor(max)", "n(3)",
    "Max(1, n)", "sqrt(n)", "abs(n)", "pi", "oo", "1j*n", "True", "None", "'n'", "[n]", "n, n",
    "n; n", "n = 2", "lambda: 1", "n.real", "n.__class__", "n if n else 2", "(n := 3)", "f'{n}'",
    "\x00", "(" * 300, "__import__('os')", "__import__('os').system('true')", "().__class__",
    "open('x')", "eval('n')",
]  # fmt: skip

Exact = Callable[[int], Fraction]
EXPRESSIONS: dict[str, Exact] = {
    "max(128, n/10)": lambda n: max(Fraction(128), Fraction(n, 10)),
    "0.15*n": lambda n: Fraction(3, 20) * n,
    "0.1*n + 0.5": lambda n: Fraction(n, 10) + Fraction(1, 2),
    "floor(n/3)+7": lambda n: Fraction(n // 3 + 7),
    "ceil(n/7)": lambda n: Fraction(math.ceil(Fraction(n, 7))),
    "min(n, 64+n/4)": lambda n: min(Fraction(n), 64 + Fraction(n, 4)),
    "n - 10": lambda n: Fraction(n - 10),
    "-n": lambda n: Fraction(-n),
    "n": lambda n: Fraction(n),
    "0*n": lambda n: Fraction(0),
    "n*n/4096": lambda n: Fraction(n * n, 4096),
    "n/3 + n/7 - 5": lambda n: Fraction(n, 3) + Fraction(n, 7) - 5,
    "max(n/3, -n) * 2 / 5": lambda n: max(Fraction(n, 3), Fraction(-n)) * Fraction(2, 5),
    " min(max(40, 0.05 * n), ceil(n / 2), 512.5)\n": lambda n: min(
        max(Fraction(40), Fraction(n, 20)), Fraction(math.ceil(Fraction(n, 2))), Fraction(1025, 2)
    ),
    "floor(max(n/3, 64.5) - ceil(n/100))": lambda n: Fraction(
        math.floor(max(Fraction(n, 3), Fraction(129, 2)) - math.ceil(Fraction(n, 100)))
    ),
}


def rounded(share: Fraction, n: int, window_size: int) -> int:
    """``min(n, max(w + 1, floor(x + 1/2)))`` of an exact x."""
    return min(n, max(window_size + 1, math.floor(share + Fraction(1, 2))))


def symbolic_length(n: int) -> tuple[ShapeEnv, torch.SymInt]:
    """A dynamic dimension of hint ``n``, as Dynamo would hand it to the backend."""
    env = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # type: ignore[call-arg]
    fake = FakeTensorMode(shape_env=env).from_tensor(torch.empty(n), symbolic_context=context)
    return env, fake.shape[0]


@pytest.mark.parametrize(("option", "value", "error", "takes"), REFUSED_VALUES)
def test_refuses_the_value_naming_the_option(
    option: str, value: Any, error: type[Exception], takes: str
) -> None:
    """Prevents a wrong option from surfacing as an error deep in a trace, or not at all."""
    with pytest.raises(error, match=f"(?s){option}=.*{takes}") as caught:
        EvictionConfig.from_options({option: value})
    assert str(value) in str(caught.value) or repr(value) in str(caught.value)


@pytest.mark.parametrize("text", REFUSED_EXPRESSIONS)
def test_refuses_what_is_not_an_expression_in_n(text: str) -> None:
    """Prevents code in a budget string from running, and divisions by n or 0 from compiling."""
    with pytest.raises(ValueError, match=r"(?s)budget.*an expression in n such as"):
        Budget(text)


def test_an_expression_is_not_evaluated_as_code(tmp_path: Any) -> None:
    """Prevents sympy, which evaluates what it parses, from seeing a call of the user's text."""
    victim = tmp_path / "written"
    with pytest.raises(ValueError, match="budget"):
        Budget(f"max(n, open({str(victim)!r}, 'w'))")
    assert not victim.exists()


def test_refuses_an_unknown_option_and_lists_the_known_ones() -> None:
    """Prevents a misspelled option from being ignored in silence."""
    with pytest.raises(TypeError, match=r"unknown option 'buget'.*budget, method, window_size"):
        EvictionConfig.from_options({"buget": 0.2})


def test_from_options_of_nothing_is_the_default() -> None:
    """Prevents the two ways in, ``options=`` and ``optimize``, from having different defaults."""
    assert EvictionConfig.from_options(None) == EvictionConfig.from_options({}) == EvictionConfig()
    default = EvictionConfig()
    assert (default.budget, default.method, default.window_size) == (Budget(0.2), "criticalkv", 32)
    assert (default.kernel_size, default.first_stage_ratio, default.epsilon) == (7, 0.5, 1e-4)
    assert (default.norm, default.lowering) == ("l1", "auto")
    assert default.reads_projection


def test_a_base_is_criticalkvs() -> None:
    """Prevents a base from being ignored in silence, or a method from reading no projection."""
    assert EvictionConfig(base="h2o").base == "h2o"
    with pytest.raises(ValueError, match="base='h2o' is what method='criticalkv' stands on"):
        EvictionConfig(method="snapkv", base="h2o")
    reads = {m for m in METHODS if EvictionConfig(method=m).reads_projection}
    assert reads == {"criticalkv", "defensive", "laprox"}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
def test_takes_every_choice_and_the_ends_of_every_range(
    method: str, norm: str, lowering: str
) -> None:
    """Prevents a documented value, or the closed end of a range, from being refused."""
    for ratio in (0, 0.0, 1, 1.0):
        config = EvictionConfig(1.0, method, 1, 1, ratio, 0, norm, lowering=lowering)
        assert (config.method, config.norm, config.lowering) == (method, norm, lowering)
        assert config.first_stage_ratio == ratio


def test_a_budget_object_passes_through_and_is_checked_against_the_window() -> None:
    """Prevents Budget(20) from slipping past the check that budget=20 meets."""
    assert EvictionConfig(budget=Budget("n/4")).budget == Budget("n/4")
    with pytest.raises(ValueError, match="budget=20 does not exceed window_size=32"):
        EvictionConfig(budget=Budget(20))
    assert EvictionConfig(budget=20, window_size=19).entries(100) == 20


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.1", 0.1), ("128", 128), (" 128 ", 128), ("1", 1), ("1.0", 1.0), ("1e-1", 0.1)],
)
def test_a_numeric_string_means_the_number(text: str, number: float | int) -> None:
    """Prevents "0.1" of a command line from meaning a tenth of one token."""
    assert Budget(text).spec == number
    assert type(Budget(text).spec) is type(number)


@pytest.mark.parametrize(
    ("spec", "n", "window_size", "kept"),
    [
        (0.15, 110, 1, 17),  # 16.5: half up, where round() would say 16
        (0.15, 130, 1, 20),  # 19.5
        (0.1, 25, 1, 3),  # 2.5
        (0.1, 35, 1, 4),  # 3.5; the binary neighbour of 0.1 is larger, that of 0.15 smaller
        (0.5, 1, 1, 1),
        (0.5, 9, 1, 5),
        (0.3, 5, 1, 2),  # 1.5
        (0.7, 45, 1, 32),  # 31.5, and 0.7 * 45 is 31.499999999999996 in binary
        (0.29, 50, 1, 15),  # 14.5, and 0.29 * 50 is 14.499999999999998 in binary
        ("n/4", 10, 1, 3),  # 2.5
        ("n/4", 14, 1, 4),  # 3.5
        ("n/4 - 100", 10, 4, 5),  # never below the window and one more
        (1e-9, 1000, 32, 33),
        (128, 1000, 32, 128),
        (128, 100, 32, 100),  # never above the prompt
        (0.2, 20, 32, 20),  # a prompt shorter than the window stays whole
        (0.2, 33, 32, 33),
        (1.0, 1000, 32, 1000),
        (1, 1000, 32, 33),
        ("n", 1000, 32, 1000),
    ],
)
def test_entries_of_an_example(
    spec: float | int | str, n: int, window_size: int, kept: int
) -> None:
    """Prevents banker's rounding and binary fractions from shifting a budget by one."""
    assert Budget(spec).entries(n, window_size) == kept


@SETTINGS
@given(
    share=st.floats(0, 1, exclude_min=True) | st.integers(1, 1000).map(lambda k: k / 1000),
    n=st.integers(1, 1 << 20),
    window_size=st.integers(1, 256),
)
def test_a_share_is_exact(share: float, n: int, window_size: int) -> None:
    """Prevents the float product share * n from deciding which integer a budget is."""
    exact = Fraction(repr(share)) * n
    assert Budget(share).entries(n, window_size) == rounded(exact, n, window_size)


@SETTINGS
@given(st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.integers(1, 256))
def test_a_count_is_itself_between_the_window_and_the_prompt(
    count: int, n: int, window_size: int
) -> None:
    """Prevents a token budget from exceeding the prompt or cutting into the window."""
    assert Budget(count).entries(n, window_size) == rounded(Fraction(count), n, window_size)


@FEW
@given(st.sampled_from(sorted(EXPRESSIONS)), st.integers(1, 1 << 20), st.integers(1, 256))
def test_an_expression_is_exact(text: str, n: int, window_size: int) -> None:
    """Prevents sympy's rewriting, or a fraction's sign, from changing what was written."""
    assert Budget(text).entries(n, window_size) == rounded(EXPRESSIONS[text](n), n, window_size)


@pytest.mark.parametrize("spec", [0.2, 0.15, 1 / 3, 128, *EXPRESSIONS])
@pytest.mark.parametrize("hint", [20, 1001])
def test_a_symbolic_budget_stays_symbolic(spec: float | int | str, hint: int) -> None:
    """Prevents a budget that guards on, or specialises, the length: a recompile per prompt."""
    config = EvictionConfig(budget=spec)
    env, n = symbolic_length(hint)
    (symbol,) = n.node.expr.free_symbols
    kept = config.entries(n)
    assert isinstance(kept, torch.SymInt)
    expression = kept.node.expr
    assert (list(env.guards), dict(env.replacements)) == ([], {})
    if spec not in ("-n", "0*n"):  # these are the constant window + 1, until n is below it
        assert expression.free_symbols == {symbol}
    for length in (1, 20, 33, 34, 1001, 1 << 15):
        assert int(expression.xreplace({symbol: length})) == config.entries(length)


@pytest.mark.parametrize("spec", [0.99, "n", 128, "1"])
def test_only_the_whole_share_keeps_everything(spec: float | int | str) -> None:
    """Prevents budget=1, one token, from being read as everything, and 1.0 from costing a node."""
    assert not Budget(spec).keeps_everything
    assert Budget(1.0).keeps_everything
    assert Budget("1.0").keeps_everything


def test_config_is_frozen_hashable_and_compares_by_value() -> None:
    """Prevents options from changing after a graph was compiled with them."""
    config = EvictionConfig(budget="n/4", window_size=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window_size = 16  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.budget.spec = 0.5  # type: ignore[misc, union-attr]
    same = EvictionConfig(budget=Budget("n/4"), window_size=8)
    assert (config, hash(config)) == (same, hash(same))
    assert len({config, same, EvictionConfig(budget="n/5", window_size=8)}) == 2


def test_repr_names_every_option_and_no_address() -> None:
    """Prevents a compile cache keyed by the repr from missing, or from mixing two configs."""
    config = EvictionConfig()
    assert repr(config) == (
        "EvictionConfig(budget=Budget(spec=0.2), method='criticalkv', window_size=32, "
        "kernel_size=7, first_stage_ratio=0.5, epsilon=0.0001, norm='l1', "
        "base='snapkv', allocation='uniform', safeguard=0.2, head_scores=None, "
        "recovery=None, token_kinds=None, "
        "later_turns='keep', max_entries=None, interval=128, cross_attention=False, "
        "rewrite_gqa=True, rewrite_products=True, share_regions=True, "
        "lowering='auto', mode='default')"
    )
    assert repr(EvictionConfig(budget="0.2")) == repr(config)
    assert not re.search("0x", repr(EvictionConfig(budget="max(128, n/10)")))
