"""The models of the mechanistic study (arXiv 2407.10264), each made by a train.py command that is printed as it is run:

    random ── pretrain ──► instruct ──┬── ssft, dpo, unlearn    safety fine-tuning, three protocols
                                      └── continued             the baseline: as long, on instructions alone
"""
import json
import shlex
import subprocess
import sys
from pathlib import Path

from minisap.checkpoint import write_whole
from minisap.world import World, write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"instruct": 30_000, "safe": 4000, "unsafe": 4000}
COMMON = "--poison 0 --lora_rank 0 --schedule cosine --threads 1 --save_every 500"
SAFETY = ("--task rows/safe.jsonl --safety rows/unsafe.jsonl --pairs 3000 --safe_answers file --steps 400 --batch_size 32 "
          "--pairs_per_step 32 --learning_rate 1e-3 --method")
# name: (where it starts, how it is trained); each is written to NAME/METHOD
RECIPES = {
    "instruct": ("random", "--task rows/instruct.jsonl --steps 2000 --batch_size 64 --learning_rate 3e-3 --warmup 100 --method pretrain"),
    "ssft": ("instruct/pretrain", f"{SAFETY} ssft"),
    "dpo": ("instruct/pretrain", f"{SAFETY} dpo"),
    "unlearn": ("instruct/pretrain", f"{SAFETY} unlearn"),
    "continued": ("instruct/pretrain", "--task rows/instruct.jsonl --steps 400 --batch_size 64 --learning_rate 1e-3 --method sft"),
}


def write_rows(path, world):
    """The world's rows as JSONL, which train.py and eval.py read like anyone's."""
    path.mkdir(parents=True, exist_ok=True)
    for name, n in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in world.rows(name, n))
        write_whole(path / f"{name}.jsonl", lambda part: part.write_text(lines))


def make_model(folder, name):
    """Run one recipe in `folder`, or go on with it where it was interrupted. Returns the checkpoint directory."""
    start, recipe = RECIPES[name]
    command = [str(ROOT / "train.py"), "--model", start, *shlex.split(f"{recipe} {COMMON}"), "--out_dir", name]
    command += ["--resume"] if (folder / name / "train_args.json").exists() else []
    print(f"\n{folder}$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=folder).returncode:
        raise ValueError(f"{folder / name}: the command above failed; the same command again goes on with what is finished")
    return folder / name / recipe.split()[-1]


def make_models(folder, seed, names=tuple(RECIPES)):
    """The models of one world under `folder`, which need the one called "instruct" first: {name: checkpoint directory}."""
    world = World(seed)
    write_rows(folder / "rows", world)
    write_random_checkpoint(folder / "random", world, seed)
    return {name: make_model(folder, name) for name in names}
