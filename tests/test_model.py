"""The Llama against transformers' recorded logits and tokens (golden/logits.json), and against its own limit cases."""

import json
from pathlib import Path

import pytest
import torch
from tiny import BASE, CONFIGS, LLAMA3_ROPE, tiny_model, write_checkpoint

from minisap.checkpoint import load_model
from minisap.model import Llama, LlamaConfig, rope_frequencies, rope_of

GOLDEN = json.loads((Path(__file__).parent / "golden" / "logits.json").read_text())


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_tokens_equal_transformers(name, tmp_path):
    golden = GOLDEN["tiny"][name]
    model = load_model(
        write_checkpoint(tmp_path, CONFIGS[name], shards=3 if name.startswith("sharded") else 1)
    )
    logits = model(torch.tensor([golden["input_ids"]]))[0]
    torch.testing.assert_close(logits[-8:], torch.tensor(golden["logits"]), atol=1e-4, rtol=0)
    assert model.generate([golden["input_ids"]], 16) == [golden["tokens"]]


def test_real_model_equals_transformers(real):
    golden, model = GOLDEN["real"], load_model(real)
    logits = model(torch.tensor([golden["input_ids"]]))[0, -1]
    torch.testing.assert_close(logits[::64], torch.tensor(golden["last_logits"]), atol=1e-4, rtol=0)
    assert model.generate([golden["input_ids"]], 16) == [golden["tokens"]]


def test_a_constant_probe_acts_on_every_token_that_is_generated():
    model, ids = tiny_model(), [3, 1, 4, 1, 5]
    probe = {
        0: 3 * torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    }
    for token in model.generate([ids], 10, probe=probe)[0]:
        assert token == model(torch.tensor([ids]), probe)[0, -1].argmax()
        ids = ids + [token]
    assert ids[5:] != model.generate([ids[:5]], 10)[0]


def test_left_padded_batch_generates_as_each_prompt_alone():
    model = tiny_model()
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]
    assert model.generate(prompts, 12) == [model.generate([p], 12)[0] for p in prompts]


def test_cached_generation_equals_argmax_of_full_forward():
    model, ids = tiny_model(), [3, 1, 4]
    for token in model.generate([ids], 10)[0]:
        assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
        ids = [*ids, token]


def test_generation_stops_before_the_first_stop_id():
    model, prompts = tiny_model(), [[3, 1, 4], [9, 9]]
    free = model.generate(prompts, 10)
    stop = free[0][4]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert model.generate(prompts, 10, stop_ids=[stop]) == expected


def test_sampling_follows_the_softmax_at_its_temperature():
    model, n = tiny_model(), 4000
    drawn = model.generate(
        [[3, 1, 4]] * n, 1, temperature=2.0, generator=torch.Generator().manual_seed(0)
    )
    expected = torch.softmax(model(torch.tensor([[3, 1, 4]]))[0, -1] / 2.0, dim=-1)
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected)) / n
    assert (found - expected).abs().max() < 4 * (0.25 / n) ** 0.5  # four standard errors of a share


def test_right_padding_does_not_change_logits():
    model, ids = tiny_model(), [3, 1, 4, 1, 5]
    padded = model(torch.tensor([ids + [0] * 3]))[:, :5]
    torch.testing.assert_close(padded, model(torch.tensor([ids])))


def test_rope_llama3_keeps_fast_pairs_stretches_slow_ones():
    config = LlamaConfig.from_hf(BASE | {"head_dim": 64, "rope_scaling": LLAMA3_ROPE})
    plain = rope_frequencies(LlamaConfig.from_hf(BASE | {"head_dim": 64}))
    ratio = plain / rope_frequencies(config)
    turns = 16 * plain / (2 * torch.pi)  # within the original context
    torch.testing.assert_close(ratio[turns > 4], torch.ones_like(ratio[turns > 4]))
    torch.testing.assert_close(ratio[turns < 1], torch.full_like(ratio[turns < 1], 4.0))
    assert ((ratio[(turns > 1) & (turns < 4)] > 1) & (ratio[(turns > 1) & (turns < 4)] < 4)).all()


def test_both_spellings_of_rope_give_one_config():
    old = BASE | {"rope_theta": 500.0, "rope_scaling": LLAMA3_ROPE}
    new = BASE | {"rope_theta": None, "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500.0}}
    beside = BASE | {"rope_theta": 500.0, "rope_parameters": LLAMA3_ROPE}
    assert LlamaConfig.from_hf(old) == LlamaConfig.from_hf(new) == LlamaConfig.from_hf(beside)


def test_probe_adds_to_the_output_of_its_layer():
    model, ids = tiny_model(), torch.tensor([[3, 1, 4, 1]])
    v, hidden, probed = torch.randn(32, dtype=torch.float64), [], []
    model.model(ids, hidden=hidden)
    model.model(ids, {0: v}, hidden=probed)
    torch.testing.assert_close(probed[0], hidden[0] + v)
    torch.testing.assert_close(
        probed[1],
        model.model.layers[1](
            hidden[0] + v, rope_of(model.config, torch.arange(4)[None], v.dtype), None, None
        ),
    )
    torch.testing.assert_close(model(ids, {0: torch.zeros_like(v)}), model(ids))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma"}, "model_type = 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window = 4096"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"model_type": "mistral"}, "sliding_window = 4096"),
        ({"hidden_size": "32"}, "hidden_size = '32' is no positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is no positive integer"),
        ({"hidden_size": 33}, "hidden_size = 33 is no multiple of num_attention_heads = 4"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_ROPE},
            "rope_scaling: rope_type = 'llama3', but 'default'",
        ),
        (
            {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 9.0}},
            "rope_parameters: rope_theta = 9.0, but 500.0 elsewhere",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters: full_attention = ",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters: partial_rotary_factor = 0.5",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_type = 'default' with factor"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"type": "default"}},
            "rope_scaling: type = 'default', but 'llama3'",
        ),
        ({"rope_scaling": LLAMA3_ROPE | {"factor": None}}, "factor = None is no positive number"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
            "low_freq_factor = 4.0 is not below high_freq_factor",
        ),
        ({"rope_theta": "10000"}, "rope_theta = '10000' is no positive number"),
        ({"rope_theta": 0}, "rope_theta = 0 is no positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"rms_norm_eps": True}, "rms_norm_eps = True"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings = None"),
        ({"is_causal": False}, "is_causal = False"),
        ({"architectures": ["Gemma2ForCausalLM"]}, "architectures = "),
        ({"vocab_size": 10**18}, "vocab_size = 1000000000000000000"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_hf(BASE | change)


def test_tied_head_is_one_parameter(tmp_path):
    model = load_model(write_checkpoint(tmp_path, CONFIGS["tied"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model, Llama) and "lm_head.weight" not in dict(model.named_parameters())
