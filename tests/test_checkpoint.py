"""Checkpoints: what is written is read back, what is broken is named. LoRA: against its definition, and merged."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import BASE, CONFIGS, tiny_model, tiny_weights, write_checkpoint

import minisap.checkpoint
from minisap.checkpoint import load_model, save_adapter, save_model
from minisap.lora import add_lora, lora_layers, merge_lora

IDS = torch.tensor([[3, 1, 4, 1, 5]])


def edit_config(path, **change):
    (path / "config.json").write_text(
        json.dumps(json.loads((path / "config.json").read_text()) | change)
    )


def edit_tensors(path, edit):
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load_gives_the_same_model(name, tmp_path, monkeypatch):
    monkeypatch.setattr(minisap.checkpoint, "MAX_SHARD_BYTES", 20_000)  # forces several shards
    source = write_checkpoint(tmp_path / "a", CONFIGS[name])
    dtype = getattr(torch, CONFIGS[name]["torch_dtype"])
    model = load_model(source, dtype)
    save_model(model, tmp_path / "b", source)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert not list((tmp_path / "b").glob("*.part"))
    assert torch.equal(load_model(tmp_path / "b", dtype)(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_converts_every_tensor(dtype, tmp_path):
    model = load_model(write_checkpoint(tmp_path), dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(IDS).double(), tiny_model()(IDS), atol=0.2, rtol=0)


def test_weights_are_mapped_from_the_file_not_copied(tmp_path):
    """A tensor changed in the file after loading changes in the model: there is one copy, the file's."""
    path = write_checkpoint(tmp_path)
    model = load_model(path)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        first = next(iter(file.keys()))
    before = dict(model.named_parameters())[first].clone()
    data = bytearray((path / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    with open(path / "model.safetensors", "r+b") as file:
        file.seek(start)
        file.write(bytes(len(data) - start))
    assert before.any() and not dict(model.named_parameters())[first].any()


def test_llama_2_s_rope_buffers_are_ignored(tmp_path):
    path = write_checkpoint(tmp_path)
    edit_tensors(
        path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    assert torch.equal(load_model(path)(IDS), load_model(write_checkpoint(tmp_path / "b"))(IDS))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: missing"),
        (truncate, "model.safetensors: truncated"),
        (lambda p: (p / "config.json").unlink(), "config.json: No such file"),
        (lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda p: edit_config(p, hidden_act="gelu"), "config.json: hidden_act = 'gelu'"),
        (
            lambda p: edit_config(p, intermediate_size=50),
            r"gate_proj.weight has shape \(48, 32\); config.json implies \(50, 32\)",
        ),
        (
            lambda p: edit_config(p, num_hidden_layers=3),
            "tensor model.layers.2.self_attn.q_proj.weight is missing",
        ),
        (
            lambda p: edit_config(p, num_hidden_layers=1),
            r"unexpected tensor model.layers.1\.[a-z_.]+ \(",
        ),
        (
            lambda p: edit_tensors(p, lambda t: t.pop("lm_head.weight")),
            "tensor lm_head.weight is missing",
        ),
        (
            lambda p: (p / "config.json").write_text("[]"),
            "config.json: expected an object, found list",
        ),
        (
            lambda p: (p / "model.safetensors.index.json").write_text("{}"),
            "index.json: weight_map is missing",
        ),
        (
            lambda p: edit_config(p, tie_word_embeddings=True),
            "config.json ties lm_head to the embedding, but the file holds another",
        ),
        (
            lambda p: edit_tensors(p, lambda t: t.update({"surprise": torch.ones(2)})),
            r"unexpected tensor surprise \(2,\)",
        ),
        (
            lambda p: (p / "model.safetensors.index.json").write_text("[]"),
            "index.json: expected an object, found list",
        ),
        (
            lambda p: (p / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": null}}'
            ),
            "index.json: 'a' lies in None, which is no name",
        ),
        *(
            (
                lambda p, name=name: (p / "model.safetensors.index.json").write_text(
                    json.dumps({"weight_map": {"a": name}})
                ),
                f"index.json: 'a' lies in .{name[:9]}.*, which is no name",
            )
            for name in (
                "../a.safetensors",
                "/etc/passwd",
                "a/b.safetensors",
                "a" * 999 + ".safetensors",
                "state.pt",
            )
        ),
        (
            lambda p: edit_config(p, num_hidden_layers=10**6),
            "num_hidden_layers = 1000000 is no positive integer of a model's size",
        ),
        (lambda p: edit_config(p, rope_theta=10**400), "rope_theta = 10+ is no positive number"),
        (
            lambda p: edit_tensors(
                p, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})
            ),
            "model.norm.weight is of type torch.int8; known: float32",
        ),
        (lambda p: (p / "config.json").write_text("[" * 10**6), "config.json: not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named(damage, message, tmp_path):
    damage(write_checkpoint(tmp_path))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_checkpoint(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: missing"):
        load_model(tmp_path)


def test_an_index_that_contradicts_its_shards_is_named(tmp_path):
    index = write_checkpoint(tmp_path, shards=2) / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps(
            {"weight_map": weight_map | {"lm_head.weight": "model-00002-of-00002.safetensors"}}
        )
    )
    with pytest.raises(
        ValueError, match="disagrees with model.safetensors.index.json on lm_head.weight"
    ):
        load_model(tmp_path)


def test_what_is_written_can_be_read_by_others(tmp_path):
    save_model(tiny_model(), tmp_path / "out", write_checkpoint(tmp_path / "source"))
    assert (
        len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1
    )  # safetensors' own would be 0600


def lora_model(dtype=torch.float64):
    model = tiny_model(dtype=dtype)
    W = add_lora(model, r=4, alpha=8, targets=("q_proj", "down_proj"))
    for w in W:
        torch.nn.init.normal_(w, std=0.3, generator=torch.Generator().manual_seed(w.numel()))
    return model, W


def test_lora_starts_as_the_model_itself():
    model = tiny_model()
    before = model(IDS)
    W = add_lora(model, r=4, alpha=8)
    assert torch.equal(model(IDS), before)
    assert len(W) == 2 * 2 * 2 and [p for p in model.parameters() if p.requires_grad] == W


def test_lora_is_w_plus_scaled_b_a():
    model, _ = lora_model()
    expected = tiny_model()
    for j in range(2):
        for block, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
            layer = getattr(getattr(model.model.layers[j], block), name)
            plain = getattr(getattr(expected.model.layers[j], block), name)
            plain.weight.data += 8 / 4 * layer.lora_B.detach() @ layer.lora_A.detach()
    torch.testing.assert_close(model(IDS), expected(IDS))


def test_merging_changes_no_logits_and_leaves_a_plain_model():
    model, _ = lora_model()
    before = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), before)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


def test_lora_is_float32_on_a_bfloat16_model_and_deterministic():
    first, second = (
        add_lora(tiny_model(dtype=torch.bfloat16), r=4, alpha=8, seed=5) for _ in range(2)
    )
    assert {w.dtype for w in first} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_lora_names_are_the_model_s_own():
    model = tiny_model()
    add_lora(model, targets=("lm_head", "o_proj"))
    names = dict(model.named_modules())
    assert (
        all(names[name] is layer for name, _, _, layer in lora_layers(model))
        and len(lora_layers(model)) == 3
    )


def test_lora_on_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="lora targets .*'c_attn'"):
        add_lora(tiny_model(), targets=("c_attn",))
    with pytest.raises(ValueError, match="lm_head is tied to the embedding"):
        add_lora(tiny_model(CONFIGS["tied"]), targets=("lm_head",))


def test_adapter_holds_peft_s_names_and_settings(tmp_path):
    model, W = lora_model(torch.float32)
    save_adapter(model, tmp_path, base="weights/x")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    assert torch.equal(tensors[name], model.model.layers[1].mlp.down_proj.lora_B) and len(
        tensors
    ) == len(W)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (
        4,
        8,
        ["down_proj", "q_proj"],
    )
    assert config["base_model_name_or_path"] == "weights/x"


def test_tiny_weights_are_the_recorded_ones():
    """The golden values hold for these weights alone."""
    weights = tiny_weights(BASE)
    assert weights["lm_head.weight"][0, 0].item() == pytest.approx(0.46776, abs=1e-5)
