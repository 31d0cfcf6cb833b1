"""Peak memory of a prefill with and without eviction, and what the cache holds afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import torch
from harness import mebibytes, parser, peak_extra_bytes, report, watched
from models import prompt, smollm2

import ckv_compile

# By default glibc's allocator keeps what was freed, more or less of it from run to run.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def child(budget: str, layers: int, length: int) -> dict[str, int]:
    """Of one prefill after a short one, which compiles and fills the allocator's pools."""
    model: Any = smollm2(layers)
    if budget != "plain":
        model = ckv_compile.optimize(model, budget=float(budget), lowering="aot_eager")
    caches: list[Any] = []

    def prefill(tokens: int) -> None:
        caches[:] = [model(prompt(tokens), use_cache=True, logits_to_keep=1).past_key_values]

    with torch.no_grad():
        prefill(256)
        peak = peak_extra_bytes(lambda: prefill(length))
    pairs = ((layer.keys, layer.values) for layer in caches[0].layers)
    return {"peak": peak, "cache": sum(tensor.nbytes for pair in pairs for tensor in pair)}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        budget, layers, length = sys.argv[2:]
        print(json.dumps(child(budget, int(layers), int(length))))
        return
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=30, metavar="N")
    options, rows = arguments.parse_args(), []
    lengths = (1024,) if options.quick else (4096, 8192)
    cases = [(n, budget) for n in lengths for budget in ("plain", "1.0", "0.2", "0.1")]
    for length, budget in watched(cases, "memory"):
        command = [sys.executable, __file__, "--child", budget, str(options.layers), str(length)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), **NOTHING_KEPT}
        output = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        found = json.loads(output.stdout.splitlines()[-1])
        rows.append(
            {
                "tokens": length,
                "budget": budget,
                "peak during prefill MiB": mebibytes(found["peak"]),
                "cache afterwards MiB": mebibytes(found["cache"]),
                "cache bytes": found["cache"],
            }
        )
    title = f"one prefill, SmolLM2's shape, {options.layers} layers, float32, lowering aot_eager"
    report("memory", title, rows, options)


if __name__ == "__main__":
    main()
