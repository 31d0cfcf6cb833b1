"""Ask SmolLM2 about a page of documentation with a fifth of the cache; compiles for minutes."""

from pydoc_data.topics import topics

from smollm2 import load

import ckv_compile

model, tokenizer = load()
ckv_compile.optimize(model, budget=0.2)

question = topics["naming"] + "\n\nIn one sentence: what is a namespace?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)  # fmt: skip
output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(ckv_compile.explain(model).summary())
