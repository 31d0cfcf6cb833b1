"""What the eviction nodes add to a prefill of SmolLM2 over a text: their share of the time."""

from __future__ import annotations

import pydoc
import time
from typing import Any

import torch
from harness import parser, report, watched

import ckv_compile
from ckv_compile import EvictionConfig
from ckv_compile.evidence.models import load_smollm2
from ckv_compile.methods.evict import EvictKV

OPTIONS = {"snapkv": {"method": "snapkv"}, "L1": {"norm": "l1"}, "L2": {"norm": "l2"}}


class Watched:
    """Seconds spent in all eviction nodes."""

    def __init__(self) -> None:
        self.seconds, self.calls, forward = 0.0, 0, EvictKV.forward

        def timed(node: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            kept = forward(node, *args, **kwargs)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return kept

        EvictKV.forward = timed  # type: ignore[method-assign]


def prefill(call: Any, input_ids: torch.Tensor) -> tuple[float, int]:
    """Seconds, and the entries that each head keeps."""
    start = time.perf_counter()
    output = call(input_ids, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - start, output.past_key_values.layers[0].keys.shape[2]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.5], metavar="SHARE")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_smollm2()
    text = "".join(pydoc.render_doc(name, renderer=pydoc.plaintext) for name in ("argparse", "ast"))
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    nodes, rows, layers = Watched(), [], model.config.num_hidden_layers
    plain: dict[int, float] = {}  # the fastest of the run, which all nodes are held against
    lengths = (2048,) if options.quick else (2048, 4096)
    cases = [(n, budget, name) for n in lengths for budget in options.budgets for name in OPTIONS]
    with torch.no_grad():
        for kv_len, budget, name in watched(cases, "node"):
            ids = input_ids[:, :kv_len]
            assert ids.shape[1] == kv_len
            entries = EvictionConfig(budget=budget).entries(kv_len)
            # The rewritten graph as it is: each node is called by name, and can be timed.
            ckv_compile.optimize(model, budget=budget, lowering="eager", **OPTIONS[name])
            prefill(model, ids[:, :256])
            spent = float("inf")
            for _ in range(options.repeats):
                took = prefill(model.forward, ids)[0]  # the model's own
                plain[kv_len] = min(plain.get(kv_len, took), took)
                nodes.seconds, nodes.calls = 0.0, 0
                kept = prefill(model, ids)[1]
                assert (nodes.calls, kept) == (layers, entries), (nodes.calls, kept)
                spent = min(spent, nodes.seconds)
            ckv_compile.restore(model)
            rows.append(
                {
                    "tokens": kv_len,
                    "budget": budget,
                    "node": name,
                    f"{layers} nodes s": spent,
                }
            )
    for row in rows:
        row["plain eager prefill s"] = plain[row["tokens"]]
        row["share %"] = 100 * row[f"{layers} nodes s"] / plain[row["tokens"]]
    report("node", "the eviction nodes' share of a prefill, SmolLM2-135M, a text", rows, options)


if __name__ == "__main__":
    main()
