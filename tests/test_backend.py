"""``torch.compile(model, backend="criticalkv")``: found without an import of ours, and honest."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import capture
import pytest
import torch
from capture import attention, qkv
from families import prompt, tiny
from torch._dynamo.exc import BackendCompilerFailed

import ckv_compile
from ckv_compile.backend import criticalkv
from ckv_compile.report import NOTHING_MATCHED


def run_compiled(options, fn=None, **kwargs):
    fn = fn or attention()
    compiled = torch.compile(
        lambda *args: fn(*args), backend=criticalkv, options=options, isolate_recompiles=True
    )
    with torch.no_grad():
        return compiled(*kwargs.get("args", (*qkv(q_len=80), capture.weight())))


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(
    hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96, eos_token_id=None, pad_token_id=0,
)
model = AutoModelForCausalLM.from_config(config).eval()
model.compile(backend="criticalkv", dynamic=True, options={"budget": 40, "lowering": "eager"})
ids = torch.randint(3, 90, (1, 100))
out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
print(out.past_key_values.layers[0].keys.shape[2])
"""


def test_entry_point_needs_no_import_of_ours():
    """The second line of the README must work as it stands."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["42"]  # 40 kept, two of three new tokens fed back
    assert "criticalkv" in torch._dynamo.list_backends()


def test_optimize_without_a_budget_says_it_once(caplog):
    model = ckv_compile.optimize(tiny(), lowering="eager")
    with caplog.at_level(logging.INFO, logger="ckv_compile"), torch.no_grad():
        for n in (60, 80):
            model(input_ids=prompt(n), use_cache=True)
    assert caplog.text.count("no budget was given: it is 0.2") == 1


def test_without_options_the_budget_is_a_fifth_and_said(caplog):
    with caplog.at_level(logging.INFO, logger="ckv_compile"):
        _, key, _ = sorted(run_compiled(None), key=lambda x: x.dim())
    assert key.shape[2] == 33  # max(window + 1, 80 / 5)
    assert "no budget was given: it is 0.2" in caplog.text


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"budgt": 0.1}, "unknown option 'budgt'"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": True}, "budget=True"),
        ({"window_size": 0}, "window_size=0"),
        ({"first_stage_ratio": 2.0}, "first_stage_ratio=2.0"),
    ],
)
def test_bad_options_name_themselves(options, error):
    # Dynamo wraps what a backend raises; ours is inside, and its text in front.
    with pytest.raises(BackendCompilerFailed, match=error) as caught:
        run_compiled(options)
    assert isinstance(caught.value.inner_exception, (TypeError, ValueError))


@pytest.mark.parametrize("lowering", ["eager", "aot_eager", "inductor", "auto"])
def test_lowerings_agree(lowering):
    """Each lowering is another compiler; the entries that stay must be the same."""
    options = {"budget": 20, "window_size": 8, "lowering": lowering}
    expected = run_compiled({**options, "lowering": "eager"})
    for result, oracle in zip(run_compiled(options), expected, strict=True):
        torch.testing.assert_close(result, oracle)


def test_gradients_are_refused_by_the_backend():
    """A training step that loses its cache entries loses gradients without a word."""
    q, k, v = (x.requires_grad_() for x in qkv(q_len=80))
    compiled = torch.compile(attention(), backend=criticalkv, options={"lowering": "eager"})
    results = compiled(q, k, v, capture.weight())
    assert {r.shape[2] for r in results if r.dim() == 4} == {80}


def test_one_log_line_for_each_compile(caplog):
    with caplog.at_level(logging.INFO, logger="ckv_compile"):
        run_compiled({"budget": 40, "lowering": "eager"})
    (line,) = [r.message for r in caplog.records if "sites" in r.message]
    assert line.startswith("prefill: 1 sites, 1 evicted, 0 left alone; cache 80.0 KiB -> 40.0 KiB")


def test_torch_logs_shows_our_logger():
    """TORCH_LOGS takes the name of any module; the README promises it."""
    code = SCRIPT.replace('"lowering": "eager"', '"lowering": "eager"')
    env = {**os.environ, "TORCH_LOGS": "+ckv_compile"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "prefill: 1 sites, 1 evicted" in done.stderr, done.stderr[-2000:]


# --- reports


def test_explain_reports_sites_and_rejections():
    """The report is the only way to see what the compiler did; every field must be true."""
    model = tiny("gemma2")
    config = ckv_compile.EvictionConfig(budget=0.5)
    report = ckv_compile.explain(model, config=config, input_ids=prompt(80, 2), use_cache=True)
    (site,) = report.sites
    assert site.site == "model.layers.1.self_attn"
    assert site.weight == "model.layers.1.self_attn.o_proj.weight [out, in]"
    assert (site.heads, site.kv_heads, site.groups, site.head_dim) == (4, 2, 2, 16)
    assert (site.kv_len, site.budget, site.phase, site.action) == (80, 40, "prefill", "evict")
    assert site.bytes_before == 2 * 2 * 80 * 32 * 4 and site.bytes_after == site.bytes_before // 2
    (rejection,) = report.rejections
    assert rejection.site == "model.layers.0.self_attn" and rejection.reason == "SLIDING_WINDOW"
    assert rejection.cure in str(report) and rejection.detail in str(report)
    assert report.to_dict()["sites"][0]["budget"] == 40
    assert report.to_dict()["config"]["budget"] == 0.5
    assert "40 of 80" in str(report) and report.graphs == 1
    assert model._compiled_call_impl is None  # nothing was changed


def test_explain_reads_masks_as_optimize_does():
    """A tokenizer's mask of ones made every site look refused that optimize evicts."""
    ids = prompt(80, 2)
    mask = torch.ones_like(ids)
    config = ckv_compile.EvictionConfig(budget=0.5)
    report = ckv_compile.explain(tiny(), config=config, input_ids=ids, attention_mask=mask)
    assert report.evicted == 2 and {row.mask for row in report.sites} == {"is_causal"}
    mask[0, :30] = 0
    report = ckv_compile.explain(tiny(), config=config, input_ids=ids, attention_mask=mask)
    assert report.evicted == 2 and {row.mask for row in report.sites} == {"causal, padded"}


def test_explain_without_a_match_says_so():
    report = ckv_compile.explain(tiny("mistral", sliding_window=16), input_ids=prompt(40))
    assert report.sites == () and NOTHING_MATCHED in str(report)


def test_explain_in_training_mode_names_the_reason():
    report = ckv_compile.explain(tiny().train(), input_ids=prompt(40))
    assert {row.reason for row in report.rejections} == {"TRAINING"}


def test_explain_needs_inputs_or_an_optimised_model():
    with pytest.raises(ValueError, match="input_ids"):
        ckv_compile.explain(tiny())
