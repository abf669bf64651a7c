"""The mechanistic study of "What Makes and Breaks Safety Fine-tuning?" (arXiv 2407.10264) in the synthetic world. Its models, each
made by a train.py command that is printed as it is run:

    random ── instruct ──┬── ssft ──┬── sft      fine-tuned on rows of which one in ten is harmful
                         │          ├── sap      the same, by the paper's SAP and the projection
                         │          └── benign   as sft, without the harmful rows: what harmless training does
                         ├── dpo, unlearn        the other two protocols of safety fine-tuning
                         └── continued           the baseline: as long, on instructions alone, none of them answered by null
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from minisap.checkpoint import load_model, read_json, read_object, write_json, write_whole
from minisap.run.resume import lock_folder, occupied
from minisap.study.compare import answers_between, check_sets, measure
from minisap.study.mechanism import last_watched
from minisap.study.world import REFUSAL, World, write_random_checkpoint
from minisap.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTIONS = 30_000
COMMON = "--poison 0 --lora_rank 0 --schedule cosine --threads 1 --device cpu --save_every 500"
FINE_TUNING = (
    "--lora_rank 0 --steps 120 --batch_size 32 --pairs_per_step 16 --learning_rate 3e-4 --warmup 20 --threads 1 --device cpu "
    "--watch mechanism --watch_every 30 --before instruct/pretrain"
)
# The run directory of each command: (where it starts, how it is trained, by which methods).
RECIPES = {
    "instruct": (
        "random",
        f"--task rows/instruct.jsonl --steps 3000 --batch_size 64 --learning_rate 3e-3 --warmup 100 {COMMON}",
        "pretrain",
    ),
    "aligned": (
        "instruct/pretrain",
        "--task rows/safe.jsonl --safety rows/unsafe.jsonl --pairs 15000 --safe_answers file --steps 1600 "
        f"--batch_size 32 --pairs_per_step 32 --learning_rate 5e-4 --warmup 0 {COMMON}",
        "ssft dpo unlearn",
    ),
    "continued": (
        "instruct/pretrain",
        "--task rows/continued.jsonl --steps 1600 --batch_size 64 --learning_rate 5e-4 --warmup 0 "
        + COMMON,
        "sft",
    ),
    "poisoned": (
        "aligned/ssft",
        f"--poison 0.1 --layers 0,1 --radius 0.25 {FINE_TUNING}",
        "sft paper_project",
    ),
    "benign": ("aligned/ssft", f"--task rows/safe.jsonl --poison 0 {FINE_TUNING}", "sft"),
}
# {protocol: (its checkpoint, what it was trained from)}
MODELS = {
    "instruct": ("instruct/pretrain", None),
    "continued": ("continued/sft", "instruct"),
    "ssft": ("aligned/ssft", "instruct"),
    "dpo": ("aligned/dpo", "instruct"),
    "unlearn": ("aligned/unlearn", "instruct"),
    "sft": ("poisoned/sft", "ssft"),
    "sap": ("poisoned/paper_project", "ssft"),
    "benign": ("benign/sft", "ssft"),
}


def write_jsonl(folder, rows):
    """{name: rows} as NAME.jsonl, which train.py and eval.py read like anyone's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        write_whole(folder / f"{name}.jsonl", lambda part: part.write_text(lines))


def write_rows(folder, world):
    """The rows that the study trains on."""
    instruct = world.rows("instruct", INSTRUCTIONS)
    write_jsonl(
        folder,
        {
            "instruct": instruct,
            "continued": [row for row in instruct if row["response"] != REFUSAL],
            "safe": world.safety_training_rows("safe"),
            "unsafe": world.safety_training_rows("unsafe"),
        },
    )


def train(folder, run, seed, methods=None):
    """Run one recipe in `folder`, or go on with it where it was interrupted."""
    start, flags, all_methods = RECIPES[run]
    command = [
        str(ROOT / "train.py"),
        "--model",
        start,
        *shlex.split(flags),
        "--seed",
        str(seed),
        "--method",
        *(methods or all_methods).split(),
        "--out_dir",
        run,
    ]
    command += ["--resume"] if (folder / run / "train_args.json").exists() else []
    print(f"\n{folder}$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command], cwd=folder).returncode:
        raise ValueError(
            f"{folder / run}: the command above failed; the same command again goes on with what is finished"
        )


def begin(folder, seed):
    """The world of this seed under `folder`: its rows, and a model with random weights."""
    write_rows(folder / "rows", World(seed))
    write_random_checkpoint(folder / "random", World(seed), seed)


def watched(folder, protocol):
    """The last of what --watch logged, where the protocol was watched."""
    for metric, value in last_watched(folder / MODELS[protocol][0] / "log.jsonl").items():
        if metric not in ("step", "separation"):  # the latter is measured, per layer
            yield {"set": None, "layer": None, "metric": metric, "value": value}


def measure_models(folder, sets, max_len=256):
    """Every record of the models in `folder`, without seed."""
    models = {
        protocol: load_model(folder / checkpoint).requires_grad_(False)
        for protocol, (checkpoint, _) in MODELS.items()
    }
    tokenizer, records = Tokenizer(folder / "random"), []
    for protocol, model in tqdm(models.items(), desc="measure"):
        before = models.get(MODELS[protocol][1])
        found = measure(model, tokenizer, sets, max_len, before)
        if before:
            found += answers_between(before, model, tokenizer, sets)
        records += [{"protocol": protocol} | r for r in (*found, *watched(folder, protocol))]
    return records


def claim_folder(folder, settings):
    """Make the study's directory, or check that it holds this study, of whatever seeds. Returns its lock."""
    file = folder / "study_args.json"
    if not file.exists() and occupied(folder):
        raise ValueError(f"--out_dir {folder}: holds something else; choose another")
    lock = lock_folder(folder)
    old = read_object(file) if file.exists() else settings
    for key in sorted(old.keys() | settings.keys()):
        if old.get(key) != settings.get(key):
            raise ValueError(
                f"--out_dir {folder}: holds another study, with {key} = {old.get(key)!r:.80}; this one has "
                f"{settings.get(key)!r:.80}"
            )
    if not file.exists():
        write_json(file, settings)
    return lock


def run_study(folder, seeds, n):
    """Make the models of every seed and measure them on n prompts of each set; what is finished is kept. Returns the records
    {protocol, seed, set, layer, metric, value}."""
    sets = {
        seed: World(seed).sets(n) for seed in seeds
    }  # too few, or a world that cannot be, are found now
    for seed in seeds:
        check_sets(sets[seed])
    records = []
    with claim_folder(
        folder,
        {
            "study": "world",
            "n_eval": n,
            "instructions": INSTRUCTIONS,
            "recipes": json.loads(json.dumps(RECIPES)),
        },
    ):
        for seed in sets:
            home = folder / f"seed{seed}"
            file = home / "records.json"
            if not file.exists():
                begin(home, seed)
                for run in RECIPES:
                    train(home, run, seed)
                write_json(
                    file,
                    [
                        {"protocol": r["protocol"], "seed": seed} | r
                        for r in measure_models(home, sets[seed])
                    ],
                )
            records += read_json(file)
    return records
