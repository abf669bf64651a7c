"""How much memory an 8B model would take, estimated on any machine from its shape alone, as train.py estimates it before a run.

    python tests/memory.py --json memory.json               Llama-3-8B in bfloat16 with LoRA, two rows of 256 tokens and two pairs a step: some minutes on two cores
"""
import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from minisap.config import LlamaConfig  # noqa: E402
from minisap.evaluate import print_table  # noqa: E402
from minisap.memory import GIB, estimate  # noqa: E402
from minisap.rivals import STRENGTH  # noqa: E402

LLAMA_3_8B = LlamaConfig.from_hf({"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                                  "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu"})
ROOM = 24 * GIB


def example(prompt, answer):
    """So many tokens of a prompt, and of an answer."""
    ids = [*range(100, 100 + prompt + answer)]
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given, found = parser.parse_args(), {}
    rows, pairs = [example(64, 192)] * 8, [(example(64, 96), example(64, 96))] * 2
    for method in ("sft", "sap", "paper_project"):
        for checkpointing in (False, True):
            args = Namespace(**vars(train.parse_args(["--model", "none", "--batch_size", "2", "--pairs_per_step", "2", "--dtype", "bfloat16", "--steps", "4"]))
                             | {"strength": STRENGTH, "checkpointing": checkpointing, "device": "cpu"})
            found[method + ", checkpointing" * checkpointing] = estimate(args, method, LLAMA_3_8B, rows, pairs)
    print_table([["", "GiB", "fits into 24"], *([name, f"{size / GIB:.1f}", "yes" if size < ROOM else "no"] for name, size in found.items())])
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
