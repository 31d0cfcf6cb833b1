"""A chat of several turns over one cut cache; shows tokens seen, entries held and bytes.

The opening message, a page of documentation, is cut to half; later turns are appended whole. The
first run compiles for minutes; --lowering eager starts sooner.
"""

from __future__ import annotations

import argparse
from pydoc_data.topics import topics

import torch
from smollm2 import load

import ckv_compile

TURNS = (
    f"{topics['naming']}\n\nIn one sentence: what does this text explain?",
    "And what is a namespace?",
    "Thank you. Which word did I ask about last?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lowering", default="auto", help="inductor, aot_eager, eager or auto")
    args = parser.parse_args()
    model, tokenizer = load()
    ckv_compile.optimize(model, budget=0.5, lowering=args.lowering)
    cache = ckv_compile.EvictedCache(config=model.config)
    input_ids = torch.empty(1, 0, dtype=torch.long)
    for turn in TURNS:
        # Appended to the very tokens that the cache has seen: a conversation that is rendered anew
        # may be cut into other tokens. generate leaves out what the cache holds.
        text = f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n"
        asked = tokenizer(text, return_tensors="pt").input_ids
        input_ids = torch.cat([input_ids, asked], dim=1)
        output = model.generate(
            input_ids, past_key_values=cache, max_new_tokens=40, do_sample=False
        )
        answer = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        input_ids = output
        print(f"> {turn[-60:].splitlines()[-1]}\n{answer.strip()}")
        held = cache.layers[0].keys.shape[2]
        print(
            f"  [{cache.get_seq_length():,} tokens seen, {held:,} entries held per head, "
            f"{cache.nbytes:,} bytes]\n"
        )


if __name__ == "__main__":
    main()
