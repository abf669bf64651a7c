"""How a step's time grows with layers, width, tokens and contrastive pairs, on random models: seconds, fitted exponents, a picture.

python tests/scaling.py --plot cost.png --json cost.json          a few minutes on one core (needs matplotlib for the picture)
"""

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from minisap.data import collate, collate_pairs  # noqa: E402
from minisap.lora import add_lora  # noqa: E402
from minisap.measure.evaluate import print_table  # noqa: E402
from minisap.methods import METHODS  # noqa: E402
from minisap.model import Llama, LlamaConfig  # noqa: E402
from minisap.optimize import update  # noqa: E402
from minisap.run.flags import pyplot  # noqa: E402

BASE = {
    "layers": 4,
    "width": 256,
    "tokens": 64,
    "pairs": 4,
}  # tokens: of a row, half of them the answer; 8 rows
GROWN = {
    "layers": (2, 4, 8, 16),
    "width": (128, 256, 512, 1024),
    "tokens": (32, 64, 128, 256),
    "pairs": (2, 4, 8, 16),
}
VOCAB, HEADS, ROWS, REPETITIONS = 8192, 8, 8, 7
OPTIONS = Namespace(projection="on", safety_weight=0.02, refusal_weight=0.0, refresh=1)


def example(random, tokens):
    ids = random.integers(0, VOCAB, tokens).tolist()
    return {"input_ids": ids, "labels": [-100] * (tokens // 2) + ids[tokens // 2 :]}


def step_of(method, layers, width, tokens, pairs):
    """step() of a method on a random model and random rows of this size."""
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(VOCAB, width, 3 * width, layers, HEADS, HEADS // 2, width // HEADS)
    ).eval()
    W = add_lora(model)
    optimizer = torch.optim.AdamW(W, lr=1e-5)
    rows, contrast = (
        [example(random, tokens) for _ in range(ROWS)],
        [(example(random, tokens), example(random, tokens)) for _ in range(pairs)],
    )
    for safe, harmful in contrast:
        harmful["input_ids"][: tokens // 2] = safe["input_ids"][: tokens // 2]  # the same prompt
    return lambda: update(
        optimizer,
        W,
        METHODS[method](model, W, collate(rows), collate_pairs(contrast), OPTIONS, {"step": 0})[0],
        1.0,
        1e-5,
    )


def seconds_of(step):
    """The median of a few steps, after two that are not counted."""
    seconds = []
    for _ in range(2 + REPETITIONS):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def exponent(sizes, seconds):
    """Of the last doublings, where what does not grow weighs little: seconds ~ size^exponent."""
    return float(np.polyfit(np.log(sizes[1:]), np.log(seconds[1:]), 1)[0])


def draw(found, file):
    figure, panels = pyplot().subplots(1, len(GROWN), figsize=(13, 3.2), sharey=True)
    for axes, (what, sizes) in zip(panels, GROWN.items()):
        for method in ("sft", "sap"):
            axes.loglog(
                sizes,
                found[what][method],
                marker="o",
                markersize=4,
                label=f"{method}: exponent {exponent(sizes, found[what][method]):.2f}",
            )
        axes.set(xlabel=what, xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("seconds a step")
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {
        what: {
            method: [seconds_of(step_of(method, **BASE | {what: size})) for size in sizes]
            for method in ("sft", "sap")
        }
        for what, sizes in GROWN.items()
    }
    print_table(
        [["grows", "method", *(f"×{2**i}" for i in range(4)), "exponent"]]
        + [
            [
                f"{what} from {GROWN[what][0]}",
                method,
                *(f"{s:.3f} s" for s in seconds),
                f"{exponent(GROWN[what], seconds):.2f}",
            ]
            for what, of in found.items()
            for method, seconds in of.items()
        ]
    )
    if args.plot:
        draw(found, args.plot)
    if args.json:
        args.json.write_text(
            json.dumps(
                {"base": BASE, "grown": GROWN, "threads": args.threads, "seconds": found}, indent=1
            )
            + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
