"""Remake weights/tiny from nothing but a seed: a Llama of 0.2M parameters that lives in the synthetic world of minisap/study/world.py,
pre-trained there (weights/tiny/instruct), then taught to refuse (weights/tiny). Eight minutes on one CPU thread.

    python weights/make_tiny.py                 in weights/tiny, by way of runs/make_tiny
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from anywhere
from minisap.run.flags import Parser, run
from minisap.study.protocols import MODELS, begin, train

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def main():
    Parser(__doc__).parse_args()
    folder, tiny = ROOT / "runs" / "make_tiny", ROOT / "weights" / "tiny"
    begin(folder, seed=0)
    train(folder, "instruct", seed=0)
    train(folder, "aligned", seed=0, methods="ssft")
    for protocol, target in (("ssft", tiny), ("instruct", tiny / "instruct")):
        source = folder / MODELS[protocol][0]
        target.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copy(source / file, target / file)
    print(f"written: {tiny}")


if __name__ == "__main__":
    run(main, "interrupted; the same command goes on with what is finished")
