"""Development only (needs transformers and peft): what train.py wrote, read by others, against ours, in float32.

python tests/golden/compare.py RUN/METHOD
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from minisap.checkpoint import load_model, read_json
from minisap.lora import add_lora
from minisap.tokenizer import Tokenizer

PROMPTS = ("Why is the sky blue?", "List three colours.", "How do I break into a smile?")


@torch.no_grad()
def compare(name, ours, theirs, batches):
    difference = max((ours(ids) - theirs(ids).logits).abs().max().item() for ids in batches)
    print(
        f"{name}: largest difference of a logit {difference:.2e} over {sum(ids.shape[1] for ids in batches)} positions"
    )


def with_adapter(path):
    """Our base model in float32 with the adapter's branches, not merged (merging rounds to the base's bfloat16)."""
    settings = read_json(path / "adapter_config.json")
    model = load_model(settings["base_model_name_or_path"])
    add_lora(model, settings["r"], settings["lora_alpha"], settings["target_modules"])
    tensors = load_file(path / "adapter_model.safetensors")
    names = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
    }
    assert not model.load_state_dict(names, strict=False).unexpected_keys
    return model


path = Path(sys.argv[1])
tokenizer = Tokenizer(path)
batches = [
    torch.tensor([tokenizer.encode(tokenizer.render([{"role": "user", "content": prompt}]))])
    for prompt in PROMPTS
]
compare(
    "merged checkpoint in transformers",
    load_model(path),
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
    batches,
)
base = read_json(path / "adapter" / "adapter_config.json")["base_model_name_or_path"]
peft = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), path / "adapter"
).eval()
compare("adapter in peft", with_adapter(path / "adapter"), peft, batches)
