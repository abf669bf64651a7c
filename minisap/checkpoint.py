"""Checkpoint directories in Hugging Face layout: config.json, tokenizer files, *.safetensors; and adapters in peft layout."""

import json
import os
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minisap.lora import lora_layers
from minisap.model import Llama, LlamaConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5 * 10**9
PLAIN_NAME = re.compile(r"[\w.-]{1,200}\.safetensors")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
UMASK = os.umask(0)
os.umask(UMASK)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def read_text(path):
    """A UTF-8 file's text; ValueError names a file that cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def parse_json(text, source):
    """The value of a JSON text; ValueError names `source`, also where a string is none (half of a surrogate pair, which no UTF-8 can hold)."""
    try:
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON: {error}") from None


def read_json(path):
    """Parse a JSON file; ValueError names the file (and the line of a syntax error)."""
    return parse_json(read_text(path), path)


def parse_log(text, path) -> list[dict]:
    """The lines of a log.jsonl, each an object; ValueError names the line that is none."""
    found = [parse_json(line, f"{path}:{i}") for i, line in enumerate(text.splitlines(), 1)]
    if wrong := [i for i, line in enumerate(found, 1) if not isinstance(line, dict)]:
        raise ValueError(f"{path}:{wrong[0]}: expected an object")
    return found


def out_of_memory(error):
    """Whether there was no room for what a step needs: of a CPU's error torch has no class."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(
        error
    )


def read_object(path) -> dict:
    """Parse a JSON file that holds one object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def load_config(path) -> LlamaConfig:
    """Read path/config.json. ValueError names the file, the key and the value that is not implemented."""
    hf = read_object(Path(path) / "config.json")
    try:
        return LlamaConfig.from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from None


def load_model(path, dtype=torch.float32, device="cpu") -> Llama:
    """Build the model on the meta device and put the checkpoint's tensors in its place: strict in names and shapes,
    memory-mapped, converted one tensor at a time, so that the weights are never held twice. On device "meta" no weight is read, and names
    and shapes alone are checked."""
    path = Path(path)
    with torch.device("meta"):
        model = Llama(load_config(path))
    tensors = {}
    for file, names in weight_files(path).items():
        tensors |= read_tensors(file, names, dtype, device)
    if model.config.tie_word_embeddings:  # some checkpoints store the tied head, some do not
        embedding = tensors.get("model.embed_tokens.weight")
        if (
            embedding is not None
            and device != "meta"
            and not torch.equal(tensors.get("lm_head.weight", embedding), embedding)
        ):
            raise ValueError(
                f"{path}: config.json ties lm_head to the embedding, but the file holds another lm_head.weight"
            )
        tensors["lm_head.weight"] = embedding
    check_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    model.tie()  # assign=True made two parameters of the tied one
    return model.eval()


def weights_crc32(path) -> int:
    """A checksum of the checkpoint's weights: not against forgers, but it tells one training's result from another's."""
    total = 0
    for file in sorted(weight_files(Path(path))):
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                total = zlib.crc32(block, total)
    return total


def weight_files(path):
    """{safetensors file: the names of its tensors}, as the checkpoint's index tells; of a single file {file: None}."""
    index, files = path / "model.safetensors.index.json", {path / "model.safetensors": None}
    if index.exists():
        weight_map, files = read_object(index).get("weight_map"), {}
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing, or does not give each tensor a file")
        for name, file in weight_map.items():
            if not isinstance(file, str) or not PLAIN_NAME.fullmatch(
                file
            ):  # nothing beside the index's own directory is read
                raise ValueError(
                    f"{index}: {name[:80]!r} lies in {file!r:.80}, which is no name of a safetensors file in this directory"
                )
            files.setdefault(path / file, set()).add(name)
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing" + (f", named by {index}" if files[file] else ""))
    return files


def read_tensors(file, names, dtype, device):
    """{name: tensor} of a file; ValueError where it is damaged, holds others than `names`, or is not in floating point."""
    try:
        with safe_open(file, framework="pt") as opened:
            if wrong := names is not None and names ^ set(opened.keys()):
                raise ValueError(
                    f"{file}: disagrees with model.safetensors.index.json on {min(wrong):.80}"
                )
            # Llama 2's files also carry RoPE's frequencies, which the config determines.
            tensors = {
                name: opened.get_tensor(name)
                for name in opened.keys()
                if not name.endswith("rotary_emb.inv_freq")
            }
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not safetensors ({error})") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise ValueError(
                f"{file}: {name} is of type {tensor.dtype}; known: {', '.join(DTYPES)}"
            )
        tensors[name] = tensor.to(
            device, dtype
        )  # a mapped tensor takes memory only when it is converted
    return tensors


def check_tensors(path, found, wanted):
    """The checkpoint must hold exactly the model's tensors, in exactly their shapes."""
    for name, tensor in wanted.items():
        if found.get(name) is None:
            raise ValueError(f"{path}: tensor {name} is missing")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(found[name].shape)}; config.json implies {tuple(tensor.shape)}"
            )
    for name in found.keys() - wanted.keys():
        raise ValueError(f"{path}: unexpected tensor {name} {tuple(found[name].shape)}")


def save_model(model, out_dir, source):
    """Write a checkpoint directory that transformers reads: safetensors (shards of at most 5 GB) in the model's dtype,
    config.json and tokenizer files from the directory `source`. LoRA must be merged. Each file appears only when whole."""
    out_dir, source = Path(out_dir), Path(source)
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    shards = split_into_shards(tensors)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        )
        write_whole(out_dir / name, lambda path: save_file(shard, path, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            out_dir / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            write_whole(out_dir / name, lambda path: shutil.copyfile(source / name, path))
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(
        out_dir / "config.json",
        read_json(source / "config.json") | {"torch_dtype": dtype, "dtype": dtype},
    )


def split_into_shards(tensors):
    shards, room = [{}], MAX_SHARD_BYTES
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards, room = [*shards, {}], MAX_SHARD_BYTES
        shards[-1][name], room = tensor, room - tensor.nbytes
    return shards


def save_adapter(model, out_dir, base):
    """Write the LoRA branches of `model` as a peft adapter on the checkpoint `base`."""
    out_dir, layers = Path(out_dir), lora_layers(model)
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach().contiguous()
        for name, _, _, layer in layers
        for part in ("lora_A", "lora_B")
    }
    write_whole(
        out_dir / "adapter_model.safetensors",
        lambda path: save_file(tensors, path, metadata={"format": "pt"}),
    )
    r = layers[0][3].lora_A.shape[0]
    write_json(
        out_dir / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": r,
            "lora_alpha": layers[0][3].scale * r,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({attribute for _, _, attribute, _ in layers}),
        },
    )


def name_chat_format(path, chat_format):
    """Write the checkpoint's chat format into its tokenizer_config.json, beside what stands there."""
    file = Path(path) / "tokenizer_config.json"
    write_json(file, (read_object(file) if file.exists() else {}) | {"chat_format": chat_format})


def write_whole(path, write):
    """Call write(temporary path), then give the file its name: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.chmod(0o666 & ~UMASK)  # safetensors would leave it to its owner alone
    part.replace(path)


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_whole(Path(path), lambda part: part.write_text(text, encoding="utf-8"))
