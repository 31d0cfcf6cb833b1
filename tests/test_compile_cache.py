"""The compile cache must know our code: a changed method may never be served by the old one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ckv_compile

SCRIPT = """
import json, sys
import torch, torch.nn.functional as F
from torch._dynamo.utils import counters
import ckv_compile
from ckv_compile.backend import compile_graph
from ckv_compile.config import EvictionConfig

def forward(q, k, v, w):
    k, v = k * 2, v * 2
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.linear(out.transpose(1, 2).flatten(2), w), k, v

reports = []
def backend(gm, example_inputs):
    config = EvictionConfig(budget=8, window_size=2, lowering="inductor")
    compiled, report = compile_graph(gm, example_inputs, config)
    reports.append(report)
    return compiled

generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) * 3 for _ in range(3))
w = torch.randn(32, 32, generator=generator)
with torch.no_grad():
    out, key, value = torch.compile(forward, backend=backend)(q, k, v, w)
rows = [(k[0, h] * 2)[:, None] == key[0, h] for h in range(2)]
kept = [row.all(-1).nonzero()[:, 0].tolist() for row in rows]
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps({"file": ckv_compile.__file__, "kept": kept, "hits": hits,
                  "sites": len(reports[0].sites), "evicted": reports[0].evicted}))
"""


def test_a_changed_method_is_compiled_anew_and_an_unchanged_one_is_not(tmp_path):
    """Seen without the key: the old result from a new process, for a body that had changed."""
    package = tmp_path / "copy" / "ckv_compile"
    shutil.copytree(Path(ckv_compile.__file__).parent, package)
    env = {
        **os.environ,
        "PYTHONPATH": str(package.parent),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }

    def run() -> dict:
        command = [sys.executable, "-c", SCRIPT]
        # Elsewhere than in the checkout, which "-c" would put before the copy.
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["file"].startswith(str(package))
        assert (result["sites"], result["evicted"]) == (1, 1)  # on a hit as well
        return result

    first = run()
    method = package / "methods" / "criticalkv.py"
    method.write_text(method.read_text().replace("Scores(scores_of(", "Scores(-scores_of("))
    second, third = run(), run()
    assert first["hits"] == 0 and second["hits"] == 0
    assert second["kept"] != first["kept"]
    assert third["hits"] == 1 and third["kept"] == second["kept"]
