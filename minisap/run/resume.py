"""The directory of a run: claimed once, its state saved as training goes, and taken up again by --resume."""

import fcntl
import os
import time
import zipfile
from pathlib import Path

import torch

from minisap.checkpoint import (
    DTYPES,
    out_of_memory,
    parse_log,
    read_object,
    read_text,
    write_json,
    write_whole,
)
from minisap.sap import put
from minisap.support import distributed as parallel
from minisap.tokenizer import FORMATS

LOCK = ".lock"
# What eval.py takes over from train_args.json, and the types that stand there.
TYPES = {
    "task": (list, type(None)),
    "safety": (str, type(None)),
    "benign": (str, type(None)),
    "pairs": (int,),
    "n_eval": (int,),
    "max_len": (int,),
    "chat_format": (str,),
    "dtype": (str,),
    "seed": (int,),
    "steps": (int,),
    "batch_size": (int,),
    "pairs_per_step": (int,),
    "poison": (float, int),
}
CHOICES = {"chat_format": FORMATS, "dtype": DTYPES}


def occupied(folder):
    """Whether a folder holds more than a lock and the *.part files that an interruption leaves. ValueError where it is none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out_dir {folder}: is a file")
    return folder.exists() and any(
        file.suffix != ".part" and file.name != LOCK for file in folder.iterdir()
    )


def lock_folder(folder):
    """Make the folder and lock it: until the file that is returned is closed, or its process ends, however. ValueError where another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--out_dir {folder}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(
            f"{folder}: a run is at work there, by process {file.read() or 'unknown'}; wait for it, or choose another directory"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_out_dir(args):
    """OUT_DIR is free, or with --resume holds a run."""
    if args.resume:
        read_run_args(args.out_dir / "train_args.json")
    elif occupied(args.out_dir):
        raise ValueError(
            f"--out_dir {args.out_dir}: already holds a run; choose another, or go on with it by --resume"
        )


def read_run_args(file):
    """{argument: value} of the run whose train_args.json this is; ValueError where it does not hold what train.py writes."""
    found = read_object(file)
    for key, types in TYPES.items():
        if key not in found:
            raise ValueError(f"{file}: {key} is missing")
        value = found[key]
        wrong = (
            type(value) not in types
            or key == "task"
            and not all(name and isinstance(name, str) for name in value or ())
            or types == (int,)
            and value < (key != "seed")
            or key in CHOICES
            and value not in CHOICES[key]
        )
        if wrong:
            raise ValueError(f"{file}: {key} = {value!r:.80}, which train.py does not write")
    return found


def claim_out_dir(args):
    """Make OUT_DIR, or with --resume check that it holds a run of the same arguments and rows. No run is ever overwritten.
    Methods are not among the arguments: each has its directory, and more can join a run later. Returns its lock."""
    file = args.out_dir / "train_args.json"
    wanted = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(args).items()
        if key not in ("resume", "method")
    }
    if not args.resume:
        lock = lock_folder(args.out_dir)
        check_out_dir(args)  # again: another may have been first
        write_json(file, wanted)
        return lock
    old = read_run_args(file)
    lock = lock_folder(args.out_dir)
    for key in sorted(
        (old.keys() | wanted.keys()) - {"out_dir", "device", "threads", "checkpointing"}
    ):
        if wanted.get(key) != old.get(key):
            raise ValueError(
                f"--resume: {file} has {key} = {old.get(key)!r}, this command {key} = {wanted.get(key)!r}"
            )
    return lock


def save_whole(whole, file):
    with open(file, "wb") as opened:  # given a path, torch.save calls a full disk a RuntimeError
        torch.save(whole, opened)


def save_state(out_dir, W, optimizer, state, records):
    """Returns when the next one is due, by time.perf_counter(): saving is to take no more than a twentieth of the time."""
    began = time.perf_counter()
    if not parallel.leads():
        return began
    whole = {
        "W": [w.detach() for w in W],
        "optimizer": optimizer.state_dict(),
        "state": state,
        "records": records,
    }
    (out_dir / "state").mkdir(exist_ok=True)
    write_whole(out_dir / "state" / "state.pt", lambda part: save_whole(whole, part))
    now = time.perf_counter()
    return now + 19 * (now - began)


def load_state(out_dir, W, optimizer):
    """(state, records) as saved, W and the optimizer put back, the log cut to the steps they hold; or a fresh beginning."""
    file = out_dir / "state" / "state.pt"
    out_dir.mkdir(exist_ok=True)
    for litter in (
        out_dir.rglob(".tmp*") if parallel.leads() else ()
    ):  # of a process that was killed while safetensors wrote
        litter.unlink()
    if not file.exists():
        if parallel.leads():
            (out_dir / "log.jsonl").unlink(missing_ok=True)
        return {"step": 0, "seconds": 0.0}, []
    try:
        with zipfile.ZipFile(file) as opened:  # torch.load takes a flipped bit for a weight
            if damaged := opened.testzip():
                raise ValueError(f"its part {damaged} is damaged")
        whole = torch.load(file, weights_only=True, map_location=W[0].device)
        put(W, whole["W"])
        optimizer.load_state_dict(whole["optimizer"])
        state, records = whole["state"], whole["records"]
    except Exception as error:  # half a dozen kinds
        if out_of_memory(error):
            raise
        raise ValueError(
            f"{file}: not a state that can be resumed ({(str(error).splitlines() or [''])[0]:.200}); remove {out_dir} to begin anew"
        ) from None
    if parallel.leads():
        cut_log(out_dir / "log.jsonl", state["step"])
    return state, records


def cut_log(file, steps):
    """Leave of a log what belongs to so many steps; ValueError where it holds fewer, or something else."""
    lines = read_text(file).splitlines(keepends=True)[:steps]
    if [found.get("step") for found in parse_log("".join(lines), file)] != list(range(steps)):
        raise ValueError(
            f"{file}: not the log of the {steps} steps that were saved; remove {file.parent} to begin anew"
        )
    write_whole(file, lambda part: part.write_text("".join(lines), encoding="utf-8"))
