"""Read a text once, keep a share of its cache, and ask it several questions that it did not know.

The hard case of eviction: when the cache is cut, no question has been seen. The first run compiles
for minutes.
"""

from __future__ import annotations

import copy
from pydoc_data.topics import topics

import torch
from smollm2 import load

import ckv_compile

QUESTIONS = (
    "In one sentence: what is a namespace?",
    "Which statement binds names in the global namespace?",
    "What does the nonlocal statement do?",
)
MARK = "<<question>>"


def main() -> None:
    model, tokenizer = load()
    ckv_compile.optimize(model, budget=0.5)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{topics['naming']}\n\n{MARK}"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    context, end = chat.split(MARK)
    context_ids = tokenizer(context, return_tensors="pt").input_ids
    cache = ckv_compile.compress(model, context_ids)
    held = cache.layers[0].keys.shape[2]
    print(f"{cache.get_seq_length():,} tokens read, {held:,} kept, {cache.nbytes:,} bytes")
    for question in QUESTIONS:
        question_ids = tokenizer(question + end, return_tensors="pt").input_ids
        input_ids = torch.cat([context_ids, question_ids], dim=1)
        # A copy: the answer must not stay in the cache for the next question.
        output = model.generate(
            input_ids, past_key_values=copy.deepcopy(cache), max_new_tokens=50, do_sample=False
        )
        answer = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        print(f"\n{question}\n  {' '.join(answer.split())}")


if __name__ == "__main__":
    main()
