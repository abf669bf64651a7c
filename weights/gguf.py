"""Turn a GGUF file of a Llama (F32, Q4_1 and Q8_0 tensors, byte-level BPE) into a bf16 checkpoint directory.

Layout of GGUF version 3: magic, version, counts; typed key-value metadata; tensor names, shapes, types and offsets; then the
tensor data. Its q and k rows are permuted for interleaved RoPE, which is undone here.
Source: github.com/ggml-org/ggml, docs/gguf.md; block layouts in ggml-common.h.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minisap.checkpoint import write_json, write_whole

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK_BYTES = {F32: 32 * 4, Q4_1: 2 + 2 + 16, Q8_0: 2 + 32}  # of 32 weights
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class Reader:
    """A cursor over the bytes of a GGUF file."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def scalar(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        length = self.scalar("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode("utf-8")

    def value(self, kind):
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(count)]
        return self.string() if kind == STRING else self.scalar(SCALARS[kind])


def read_gguf(path):
    """(metadata, {tensor name: float32 array}) of a GGUF file. ValueError names a version or type that is not implemented."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    reader = Reader(data)
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path}: not a GGUF file")
    reader.at = 4
    version, n_tensors, n_keys = reader.scalar("I"), reader.scalar("Q"), reader.scalar("Q")
    if version != 3:
        raise ValueError(f"{path}: GGUF version {version} is not implemented; known: 3")
    metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(n_keys)}
    infos = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.scalar("I")
        shape = [reader.scalar("Q") for _ in range(n_dims)][::-1]  # stored fastest dimension first
        infos.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        if kind not in BLOCK_BYTES:
            raise ValueError(
                f"{path}: tensor {name} has type {kind}; known: 0 (F32), 3 (Q4_1), 8 (Q8_0)"
            )
        size = int(np.prod(shape)) * BLOCK_BYTES[kind] // 32
        tensors[name] = dequantise(data[start + offset : start + offset + size], kind).reshape(
            shape
        )
    return metadata, tensors


def dequantise(data, kind):
    """Blocks of 32 weights to float32: Q8_0 is w = d·q, Q4_1 is w = d·q + m with the first 16 weights in the low nibbles."""
    if kind == F32:
        return data.view(np.float32)
    blocks = data.reshape(-1, BLOCK_BYTES[kind])
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return d * blocks[:, 2:].view(np.int8)
    m = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    return d * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + m


def unpermute(weight, n_heads):
    """Rows of q or k from interleaved pairs (GGUF) back to split halves (Hugging Face)."""
    return weight.reshape(n_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def hf_name(name):
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem = name.removesuffix(".weight")
    if stem in top:
        return f"{top[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def convert(path, out_dir):
    """Write out_dir/{model.safetensors, config.json, tokenizer.json, tokenizer_config.json} from the GGUF file at `path`."""
    metadata, tensors = read_gguf(path)
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    config = config_of(metadata, tied="output.weight" not in tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights = {}
    for name, array in tensors.items():
        part = name.split(".")[-2]
        array = unpermute(array, heads[part]) if part in heads else array
        weights[hf_name(name)] = torch.from_numpy(np.array(array)).to(torch.bfloat16)
    write_whole(
        out_dir / "model.safetensors",
        lambda part: save_file(weights, part, metadata={"format": "pt"}),
    )
    write_json(out_dir / "config.json", config)
    write_tokenizer(metadata, out_dir)


def config_of(metadata, tied):
    m = {key.removeprefix("llama."): value for key, value in metadata.items()}
    if metadata["general.architecture"] != "llama":
        raise ValueError(
            f"general.architecture = {metadata['general.architecture']!r} is not implemented; known: 'llama'"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": m["embedding_length"],
        "intermediate_size": m["feed_forward_length"],
        "num_hidden_layers": m["block_count"],
        "num_attention_heads": m["attention.head_count"],
        "num_key_value_heads": m["attention.head_count_kv"],
        "max_position_embeddings": m["context_length"],
        "rope_theta": m["rope.freq_base"],
        "rms_norm_eps": float(f"{m['attention.layer_norm_rms_epsilon']:.6g}"),
        "tie_word_embeddings": tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def write_tokenizer(metadata, out_dir):
    """Byte-level BPE from the file's vocabulary and merges, with SmolLM's pre-tokenisation: single digits, then GPT-2's rule."""
    m = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if (m["model"], m["pre"]) != ("gpt2", "smollm"):
        raise ValueError(
            f"tokenizer {m['model']}/{m['pre']} is not implemented; known: gpt2/smollm"
        )
    tokens = m["tokens"]
    bpe = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [tuple(merge.split(" ")) for merge in m["merges"]],
    )
    tokenizer = Tokenizer(bpe)
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, m["token_type"]) if kind == 3]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    write_whole(out_dir / "tokenizer.json", lambda part: tokenizer.save(str(part)))
    write_json(
        out_dir / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[m["bos_token_id"]],
            "eos_token": tokens[m["eos_token_id"]],
            "unk_token": tokens[m["unknown_token_id"]],
            "pad_token": tokens[m["padding_token_id"]],
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )
