"""Milliseconds per new token against the length of the prompt and the budget."""

from __future__ import annotations

import time
from typing import Any

import torch
from harness import mebibytes, parser, report, timed, watched
from models import prompt, smollm2

import ckv_compile

BUDGETS = (1.0, 0.5, 0.2, 0.1)


class Decoder:
    """A model behind its prompt, ready for more tokens."""

    def __init__(self, model: Any, input_ids: torch.Tensor) -> None:
        self.model, self.position = model, input_ids.shape[1]
        output = model(input_ids, use_cache=True, logits_to_keep=1)
        self.cache, self.token = output.past_key_values, output.logits.argmax(-1)

    @property
    def nbytes(self) -> int:
        pairs = ((layer.keys, layer.values) for layer in self.cache.layers)
        return sum(tensor.nbytes for pair in pairs for tensor in pair)

    def step(self) -> float:
        """Seconds of one more token."""
        start = time.perf_counter()
        position = torch.tensor([[self.position]])
        output = self.model(
            self.token, past_key_values=self.cache, use_cache=True, position_ids=position
        )
        self.token, self.position = output.logits[:, -1:].argmax(-1), self.position + 1
        return time.perf_counter() - start


class Mover:
    """Bytes moved per second by a copy and by a sum, on tensors that no processor's cache holds."""

    def __init__(self) -> None:
        source, to = torch.ones(1 << 26), torch.empty(1 << 26)
        self.moves = {"copy": lambda: to.copy_(source), "read": lambda: source.sum()}
        self.moved = {"copy": source.nbytes + to.nbytes, "read": source.nbytes}

    def rates(self) -> dict[str, float]:
        return {name: self.moved[name] / took for name, took in timed(self.moves, 1).items()}


def products(model: torch.nn.Module) -> float:
    """Seconds of one token's products with all weights, as PyTorch runs them, and nothing else."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    tokens = {layer.in_features: torch.randn(1, 1, layer.in_features) for layer in layers}

    def run() -> None:
        for layer in layers:
            torch.nn.functional.linear(tokens[layer.in_features], layer.weight)

    return timed({"products": run}, 10)["products"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=30, metavar="N")
    options.add_argument("--lowering", default="auto")
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    lengths = (512, 2048) if options.quick else (512, 2048, 4096, 8192)
    plain = smollm2(options.layers)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    ours = ckv_compile.optimize(smollm2(options.layers), budget=1.0, lowering=options.lowering)
    rows, mover = [], Mover()
    with torch.no_grad():
        for length in watched(lengths, "decode"):
            decoders = {"eager, full": Decoder(plain, prompt(length))}
            for budget in BUDGETS:
                ours = ckv_compile.optimize(ours, budget=budget, lowering=options.lowering)
                decoders[f"ours, {budget}"] = Decoder(ours, prompt(length))
            best = dict.fromkeys(decoders, float("inf"))
            fastest = {"copy": 0.0, "read": 0.0}
            # In turns with what they are held against: all are hit by what else the machine does.
            for _ in range(3 + 4 * options.repeats):
                for name, decoder in decoders.items():
                    best[name] = min(best[name], decoder.step())
                fastest = {name: max(fastest[name], new) for name, new in mover.rates().items()}
            alone = products(plain)
            for name, decoder in decoders.items():
                copied, read = ((weights + decoder.nbytes) / fastest[m] for m in ("copy", "read"))
                rows.append(
                    {
                        "prompt": length,
                        "cache": name,
                        "cache MiB": mebibytes(decoder.nbytes),
                        "ms / token": 1e3 * best[name],
                        "against eager": best["eager, full"] / best[name],
                        "copy GB/s": fastest["copy"] / 1e9,
                        "products ms": 1e3 * alone,
                        "floor ms": 1e3 * copied,
                        "time / floor": best[name] / copied,
                        "time / floor of reads": best[name] / read,
                    }
                )
    title = (
        f"one new token, SmolLM2's shape, {options.layers} layers, float32; floor: weights and "
        "cache copied; products: those with all weights alone"
    )
    report("decode", title, rows, options)


if __name__ == "__main__":
    main()
