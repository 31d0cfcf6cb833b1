"""A scoring method of your own: attention on values that are unlike the others. On a tiny model."""

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import ckv_compile
from ckv_compile import ScoreInputs, Scores


def novelty(inputs: ScoreInputs) -> Scores:
    """``A_i * (1 - cos(v_i, sum_j v_j))``, A the pooled mean attention of the window."""
    value = inputs.value.float()  # [B, Hkv, K, Dv]; scores are float32, whatever the model is
    if inputs.real is not None:  # [B, K], False at pads
        value = value * inputs.real[:, None, :, None]
    likeness = F.cosine_similarity(value, value.sum(2, keepdim=True), dim=-1)
    return Scores(inputs.window_attention() * (1 - likeness))  # [B, Hkv, K], higher = keep


# Its scores are never negative, so CriticalKV can stand on them as well.
ckv_compile.register_method("novelty", novelty, base=True)

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None)).eval()
prompt = torch.randint(3, 256, (1, 200))

for options in ({"method": "novelty"}, {"method": "criticalkv", "base": "novelty"}):
    # By default Inductor compiles the graph; lowering="eager" runs it as it is.
    ckv_compile.optimize(model, budget=0.25, lowering="eager", **options)
    done = model.generate(
        prompt, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, pad_token_id=0
    )
    kept = done.past_key_values.layers[0].keys.shape[2] - 7  # the 8th token is not cached
    print(f"{options}: {prompt.shape[1]} tokens came in, {kept} entries per head stayed")
