"""How much memory an 8B model would take, estimated on any machine from its shape alone, as train.py estimates it before a run.

python tests/memory.py --json memory.json               Llama-3-8B in bfloat16 with LoRA, two rows of 256 tokens and two pairs a step: some minutes on two cores
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from minisap.config import LlamaConfig  # noqa: E402
from minisap.run.memory import GIB, estimate, largest_batches  # noqa: E402

LLAMA_3_8B = LlamaConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
)


def example(row, prompt, answer, other=False):
    """So many tokens of a prompt of its own, and of one answer to it or the other."""
    ids = [row] * prompt + [row + 1000 * other] * answer
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    given, found = parser.parse_args(), {}
    rows, pairs = (
        [example(row, 64, 192) for row in range(8)],
        [(example(row, 64, 96), example(row, 64, 96, True)) for row in range(2)],
    )
    for method in ("sft", "sap"):
        for checkpointing in (False, True):
            args = train.parse_args(
                [
                    "--model",
                    "none",
                    "--batch_size",
                    "2",
                    "--pairs_per_step",
                    "2",
                    "--dtype",
                    "bfloat16",
                    "--steps",
                    "4",
                    "--device",
                    "cpu",
                    *["--checkpointing"] * checkpointing,
                ]
            )
            name = method + ", checkpointing" * checkpointing
            found[name] = estimate(
                args, method, LLAMA_3_8B, largest_batches(args, LLAMA_3_8B, rows, pairs)
            )
            print(f"{name}: {found[name] / GIB:.1f} GiB", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
