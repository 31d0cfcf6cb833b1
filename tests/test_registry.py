"""A user's own method: what is refused, what it may return, and the key of its code."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import ckv_compile
from ckv_compile import EvictionConfig, ScoreInputs, Scores, register_method
from ckv_compile.methods.evict import EvictKV
from ckv_compile.registry import METHODS, key_of

FACTOR = 2.0


def mine(inputs: ScoreInputs) -> Scores:
    return Scores(FACTOR * inputs.window_attention())


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """No name outlives its test."""
    with mock.patch.dict(METHODS):
        yield


def evicted(method: str, **options: Any) -> torch.Tensor:
    config = EvictionConfig(9, method, window_size=4, lowering="eager", **options)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, 20, 8), (1, 2, 20, 8), (1, 2, 20, 8), (16, 32))
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    if not config.reads_projection:
        tensors[3] = None  # as the pass has it
    return EvictKV(config, False, from_config=True)(*tensors)[2]


def test_a_registered_method_is_an_option_and_a_base() -> None:
    """Prevents a name that is registered and still unknown, or that runs another method."""
    register_method("mine", mine, base=True)
    assert torch.equal(evicted("mine"), evicted("snapkv"))
    over = evicted("criticalkv", base="mine", epsilon=0.0)
    assert torch.equal(over, evicted("criticalkv", epsilon=0.0))
    register_method("other", lambda inputs: mine(inputs))
    with pytest.raises(ValueError, match="base='other' is not registered as a base"):
        EvictionConfig(base="other")


def takes_two(inputs: ScoreInputs, more: int) -> Scores:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "function", "error", "message"),
    [
        ("snapkv", mine, ValueError, "name='snapkv' is taken; the names are criticalkv, snapkv"),
        ("my method", mine, ValueError, "it takes letters, digits and _"),
        (3, mine, TypeError, "name=3 is a int; it takes a new name"),
        ("mine", 3, TypeError, "function=3 is not a function; it takes a function of one"),
        ("mine", Scores, TypeError, "is not a function"),
        ("mine", takes_two, TypeError, "missing a required argument: 'more'; it takes a function"),
        ("mine", lambda: None, TypeError, "too many positional arguments"),
    ],
)
def test_refuses(name: Any, function: Any, error: type[Exception], message: str) -> None:
    """Prevents a method of ours from being replaced, and errors that wait until it is traced."""
    with pytest.raises(error, match=message):
        register_method(name, function)
    assert METHODS.get(name) is None or METHODS[name].function is not function
    with pytest.raises(TypeError, match="base=1; it takes True or False"):
        register_method("flagged", mine, base=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i: i.window_attention(), TypeError, "returned a Tensor; it returns Scores"),
        (lambda i: Scores(i.key.norm(dim=-1).half()), ValueError, "base=torch.float16"),
        (lambda i: Scores(i.query.norm(dim=-1)), ValueError, r"takes float32 \[B, 2, K\]"),
        (lambda i: Scores(i.key), ValueError, r"base=torch.float32 \(1, 2, 20, 8\)"),
        (lambda i: Scores(None), ValueError, "base=None"),
        (lambda i: Scores(i.projected_norm()), ValueError, "without reads_projection=True"),
    ],
)
def test_what_a_method_returns(function: Any, error: type[Exception], message: str) -> None:
    """Prevents scores of query heads, or in half precision, from choosing wrong entries."""
    register_method("mine", function)
    with pytest.raises(error, match=message):
        evicted("mine")


def loaded(path: Path, source: str) -> Callable[[ScoreInputs], Scores]:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("users_method", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.mine


def test_the_key_follows_the_source_and_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents a changed method from being answered with the compiled code of the old one."""
    source = "def mine(inputs):\n    return helper(inputs)\ndef helper(inputs):\n    return {}\n"
    keys = [key_of(loaded(tmp_path / "users.py", source.format(i))) for i in (0, 1, 0)]
    assert keys[0] == keys[2] != keys[1]

    def scaled(factor: Any) -> Callable[[ScoreInputs], Scores]:
        return lambda inputs: Scores(factor * inputs.window_attention())

    assert key_of(scaled(1.0)) == key_of(scaled(1.0)) != key_of(scaled(2.0))
    before = key_of(mine)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert key_of(mine) != before
    # Without a content that can be read, each is of its own.
    for unread in (scaled(torch.ones(1)), functools.partial(mine), eval("lambda i: i")):
        assert key_of(unread) != key_of(unread)
    assert key_of(METHODS["snapkv"].function) == ""


def test_the_node_says_its_key(tmp_path: Path) -> None:
    """Prevents a key that the compile cache never sees: it is made of the nodes' repr."""
    register_method("mine", mine, base=True)
    for config in (EvictionConfig(method="mine"), EvictionConfig(base="mine")):
        assert f"mine@{METHODS['mine'].key}" in repr(EvictKV(config, False, True))
    assert "method=criticalkv, base=snapkv," in repr(EvictKV(EvictionConfig(), False, True))


SCRIPT = """
import json
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
import ckv_compile
from users import mine

ckv_compile.register_method("mine", mine)

def forward(q, k, v, w):
    k, v = k * 2, v * 2
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), w), k, v

generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) * 3 for _ in range(3))
w = torch.randn(32, 32, generator=generator)
options = {"budget": 8, "window_size": 2, "method": "mine"}
with torch.no_grad():
    key = torch.compile(forward, backend="criticalkv", options=options)(q, k, v, w)[1]
kept = [((k[0, h] * 2)[:, None] == key[0, h]).all(-1).nonzero()[:, 0].tolist() for h in range(2)]
print(json.dumps({"kept": kept, "hits": counters["aot_autograd"]["autograd_cache_hit"]}))
"""
USERS = """
from ckv_compile import Scores

def mine(inputs):
    return Scores({}inputs.key.norm(dim=-1))
"""


@pytest.mark.slow
def test_a_changed_method_is_compiled_anew(tmp_path: Path) -> None:
    """Prevents a stale cache across processes: our own sources have not changed here."""
    root = Path(ckv_compile.__file__).parent.parent
    env = {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }

    def run(sign: str) -> dict[str, Any]:
        (tmp_path / "users.py").write_text(USERS.format(sign))
        command = [sys.executable, "-B", "-c", SCRIPT]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    first, second, third = run(""), run("-"), run("-")
    assert first["hits"] == second["hits"] == 0 and third["hits"] == 1
    assert first["kept"] != second["kept"] == third["kept"]
