"""Remake weights/tiny from nothing but a seed: a Llama of 0.2M parameters that lives in the synthetic world of minisap/world.py,
pre-trained there (weights/tiny/instruct), then taught to refuse (weights/tiny). Five to seven minutes on one CPU thread.

    python weights/make_tiny.py                 in weights/tiny, by way of runs/make_tiny
"""
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                           # so that it runs from anywhere
from minisap.script import Parser, run
from minisap.study import make_models

FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


def main():
    Parser(__doc__).parse_args()
    models = make_models(ROOT / "runs" / "make_tiny", seed=0, names=("instruct", "ssft"))
    tiny = ROOT / "weights" / "tiny"
    for source, target in ((models["ssft"], tiny), (models["instruct"], tiny / "instruct")):
        target.mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copy(source / file, target / file)
    print(f"written: {tiny}")


if __name__ == "__main__":
    run(main, "interrupted; the same command goes on with what is finished")
