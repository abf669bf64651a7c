"""Tiny checkpoints on disk, the same on every machine: weights come from NumPy's legacy generator, whose stream is frozen. And a row's slope by hand."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

from minisap.data import collate
from minisap.model import Llama, LlamaConfig
from minisap.sap import inner, useful_loss

BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "gqa_llama3_rope": BASE | {"rope_scaling": LLAMA3_ROPE},
    "tied": BASE | {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "head_dim_10": BASE | {"head_dim": 10},
    "qwen2_bias": BASE
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "mistral_rope_parameters": {key: value for key, value in BASE.items() if key != "rope_theta"}
    | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "sharded_bf16": BASE | {"num_hidden_layers": 3, "torch_dtype": "bfloat16"},
}


def tiny_weights(hf_config, seed=0):
    """{name: float32 tensor}: N(0, 1.5²/fan_in) for matrices, about 1 for norms, N(0, 1) for embeddings and biases."""
    with torch.device("meta"):
        shapes = {
            name: tuple(p.shape)
            for name, p in Llama(LlamaConfig.from_hf(hf_config)).named_parameters()
        }
    random, tensors = np.random.RandomState(seed), {}
    for name in sorted(shapes):
        noise = random.standard_normal(shapes[name])
        if "norm" in name:
            noise = 1 + 0.1 * noise
        elif len(shapes[name]) == 2 and "embed" not in name:
            noise = 1.5 * noise / np.sqrt(shapes[name][1])
        tensors[name] = torch.tensor(noise, dtype=torch.float32)
    return tensors


def write_checkpoint(path, hf_config=BASE, seed=0, shards=1):
    """A checkpoint directory (no tokenizer); returns its path."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, hf_config["torch_dtype"])
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_weights(hf_config, seed).items()}
    names = sorted(tensors)
    files = {
        f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        if shards > 1
        else "model.safetensors": names[i::shards]
        for i in range(shards)
    }
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (path / "config.json").write_text(json.dumps(hf_config))
    return path


def tiny_model(hf_config=BASE, seed=0, dtype=torch.float64):
    model = Llama(LlamaConfig.from_hf(hf_config))
    model.load_state_dict(tiny_weights(hf_config, seed), strict=False)
    return model.to(dtype).eval()


SPECIALS = [
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|im_start|>",
    "<|im_end|>",
]
VOCAB_SIZE = 256 + len(SPECIALS)


def write_tokenizer(path, chat_format="chatml"):
    """A byte-level tokenizer without merges: one token a byte, and the special tokens of every chat format."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens(SPECIALS)
    tokens.save(str(Path(path) / "tokenizer.json"))
    (Path(path) / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "chat_format": chat_format})
    )
    return path


def beginnings(row):
    """(t, a batch of the row up to its answer's t-th token), for every t."""
    first, T = (
        row["labels"].index(next(label for label in row["labels"] if label != -100)),
        len(row["labels"]),
    )
    return [
        (end - first, collate([{key: x[:end] for key, x in row.items() if isinstance(x, list)}]))
        for end in range(first + 1, T + 1)
    ]


def slope_by_hand(model, W, direction, row, min_tokens):
    """By the gradient of every beginning's loss, and nothing else."""
    return min(
        0.0,
        *(
            t
            / max(t, min_tokens)
            * inner(torch.autograd.grad(useful_loss(model, begun), W), direction).item()
            for t, begun in beginnings(row)
        ),
    )
