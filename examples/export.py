"""Export a prefill, cut its cache, save it, compile it by AOTInductor and decode from what it kept.

The model has random weights: what counts is the path. Minutes on a CPU, for the C++ compiler.
"""

import tempfile
from pathlib import Path

import torch
from torch.export import Dim
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import ckv_compile  # who loads the program must import it too, for the ops that it adds


class Prefill(torch.nn.Module):
    """Logits, keys and values as plain tensors."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        done = self.model(input_ids=input_ids, use_cache=True)
        layers = done.past_key_values.layers
        return (done.logits, *(x for layer in layers for x in (layer.keys, layer.values)))


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config).eval()
ids = torch.randint(3, 90, (1, 200))

with torch.no_grad():
    program = torch.export.export(
        Prefill(model), (ids,), dynamic_shapes=({1: Dim("n", min=2, max=1024)},)
    )
cut = ckv_compile.optimize(program, budget=0.25)
print(ckv_compile.explain(program, config=ckv_compile.EvictionConfig(budget=0.25)))

folder = Path(tempfile.mkdtemp())
torch.export.save(cut, folder / "prefill.pt2")
loaded = torch.export.load(folder / "prefill.pt2")
package = torch._inductor.aoti_compile_and_package(
    loaded, package_path=str(folder / "prefill_compiled.pt2")
)
prefill = torch._inductor.aoti_load_package(package)

logits, *caches = prefill(ids)
print(f"{ids.shape[1]} tokens came in, {caches[0].shape[2]} entries per head came back")
cache = DynamicCache()
for i in range(0, len(caches), 2):
    cache.update(caches[i], caches[i + 1], i // 2)
tokens = [logits[:, -1:].argmax(-1)]
with torch.no_grad():
    for position in range(ids.shape[1], ids.shape[1] + 7):
        # The cache counts entries; positions count tokens.
        here = torch.tensor([[position]])
        step = model(tokens[-1], past_key_values=cache, position_ids=here)
        tokens.append(step.logits[:, -1:].argmax(-1))
print("tokens:", torch.cat(tokens, 1).tolist())
