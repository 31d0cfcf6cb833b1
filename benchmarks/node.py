"""What the eviction node adds to a prefill: its share of the time."""

from __future__ import annotations

import torch
from harness import parser, report, timed, watched
from models import prompt, smollm2

from ckv_compile.config import EvictionConfig
from ckv_compile.methods.evict import EvictKV

BUDGET = 0.1


def node_of(norm: str, method: str, kv_len: int) -> object:
    """One layer's node, compiled by Inductor, on tensors as a prefill of the model leaves them."""
    config = EvictionConfig(budget=BUDGET, method=method, norm=norm)
    node = EvictKV(config, in_out=False, from_config=True)
    node = torch.compile(node, fullgraph=True, recompile_limit=64)
    shape = (1, kv_len, 9, 64)
    query = torch.randn(shape).transpose(1, 2)
    key, value = torch.randn(1, 3, kv_len, 64), torch.randn(1, kv_len, 3, 64).transpose(1, 2)
    weight = torch.nn.Parameter(torch.randn(576, 576), requires_grad=False)
    kept = node(query, key, value, weight)[0].shape[2]
    assert kept == config.entries(kv_len), kept
    return lambda: node(query, key, value, weight)


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    layers = 30
    model, rows = smollm2(layers), []
    for kv_len in watched((2048,) if options.quick else (2048, 4096), "node"):
        nodes = {
            "snapkv": node_of("l1", "snapkv", kv_len),
            "criticalkv, L1": node_of("l1", "criticalkv", kv_len),
            "criticalkv, L2": node_of("l2", "criticalkv", kv_len),
        }
        input_ids = prompt(kv_len)
        prefill = {"prefill": lambda ids=input_ids: model(ids, logits_to_keep=1)}
        with torch.no_grad():
            seconds = timed({**prefill, **nodes}, options.repeats)
        rows += [
            {
                "tokens": kv_len,
                "node": name,
                "plain eager prefill s": seconds["prefill"],
                "30 nodes s": layers * seconds[name],
                "share %": 100 * layers * seconds[name] / seconds["prefill"],
            }
            for name in nodes
        ]
    report("node", "the eviction node's share of a prefill, SmolLM2's shape", rows, options)


if __name__ == "__main__":
    main()
