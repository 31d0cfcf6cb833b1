"""Compiling: how long it takes, with and without eviction, and what it gains over eager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from harness import parser, report, watched
from models import prompt, smollm2

import ckv_compile

CASES = ("eager model", "plain inductor", "eager", "aot_eager", "inductor")


def build(case: str, layers: int) -> Any:
    """The model as the case has it, not yet compiled."""
    model = smollm2(layers)
    if case == "eager model":
        return model
    if case == "plain inductor":
        model.forward = torch.compile(model.forward, dynamic=True)
        return model
    return ckv_compile.optimize(model, budget=0.1, lowering=case)


def run(model: Any, length: int) -> tuple[float, float]:
    """Seconds of a prefill, and of a step behind it, the second of two."""
    start = time.perf_counter()
    output = model(prompt(length), use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - start
    for i in range(2):
        start = time.perf_counter()
        position = torch.tensor([[length + i]])
        output = model(
            prompt(1), use_cache=True, past_key_values=output.past_key_values, position_ids=position
        )
    return prefill, time.perf_counter() - start


def child(case: str, layers: int, length: int, repeats: int) -> dict[str, Any]:
    """First call, then the fastest of some, beside an eager model in the same process."""
    torch.manual_seed(0)
    with torch.no_grad():
        model, plain = build(case, layers), build("eager model", layers)
        torch._dynamo.utils.counters.clear()
        start = time.perf_counter()
        run(model, length - 7)
        first = time.perf_counter() - start
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = {"first": first, "graphs": graphs}
        pairs = [(run(plain, length), run(model, length)) for _ in range(repeats)]
    for i, name in enumerate(("prefill", "decode") if pairs else ()):
        found[f"eager {name}"] = min(pair[0][i] for pair in pairs)
        found[name] = min(pair[1][i] for pair in pairs)
    return found


def in_process(
    case: str, layers: int, length: int, repeats: int, cache: str, options: Any
) -> dict[str, Any]:
    """A process of its own: compiled code and caches of one case are none of another's."""
    arguments = (case, str(layers), str(length), str(repeats), str(options.threads))
    result = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    return json.loads(result.stdout.splitlines()[-1])


def measure(case: str, layers: int, length: int, options: Any) -> dict[str, Any]:
    """A row: with empty caches, then with what that left on the disk."""
    with tempfile.TemporaryDirectory() as cache:
        cold = in_process(case, layers, length, 0, cache, options)
        warm = in_process(case, layers, length, options.repeats, cache, options)
    return {
        "layers": layers,
        "tokens": length,
        "case": case,
        "first call, cold s": cold["first"],
        "first call, warm s": warm["first"],
        "graphs": cold["graphs"],
        "prefill s": warm["prefill"],
        "decode ms": 1e3 * warm["decode"],
        "prefill, eager / this": warm["eager prefill"] / warm["prefill"],
        "decode, eager / this": warm["eager decode"] / warm["decode"],
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        case, layers, length, repeats, threads = sys.argv[2:]
        torch.set_num_threads(int(threads))
        print(json.dumps(child(case, int(layers), int(length), int(repeats))))
        return
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, nargs="+", default=[2, 30], metavar="N")
    arguments.add_argument("--tokens", type=int, default=2048, metavar="N")
    arguments.add_argument("--cases", nargs="+", default=CASES[1:], choices=CASES)
    options = arguments.parse_args()
    layers = options.layers[:1] if options.quick else options.layers
    cases = [(case, count) for count in layers for case in options.cases]
    rows = [
        measure(case, count, options.tokens, options) for case, count in watched(cases, "lowerings")
    ]
    report("lowerings", "SmolLM2's shape, budget 0.1; lowerings and eager models", rows, options)


if __name__ == "__main__":
    main()
