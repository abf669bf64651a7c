"""The directory of a run: claimed once, its state saved as training goes, and taken up again by --resume."""
import fcntl
import os
from pathlib import Path

import torch

from minisap import parallel
from minisap.checkpoint import read_object, write_json, write_whole
from minisap.sap import put

LOCK = ".lock"


def occupied(folder):
    """Whether a folder holds more than a lock and the *.part files that an interruption leaves."""
    return folder.exists() and any(file.suffix != ".part" and file.name != LOCK for file in folder.iterdir())


def lock_folder(folder):
    """Make the folder and lock it: until the file that is returned is closed, or its process ends, however. ValueError where another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{folder}: a run is at work there, by process {file.read() or 'unknown'}; wait for it, or choose another directory") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def claim_out_dir(args):
    """Make OUT_DIR, or with --resume check that it holds a run of the same arguments and rows. No run is ever overwritten.
    Methods are not among the arguments: each has its directory, and more can join a run later. Returns its lock."""
    file = args.out_dir / "train_args.json"
    wanted = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
              if key not in ("resume", "method")}
    if not args.resume:
        if occupied(args.out_dir):
            raise ValueError(f"--out_dir {args.out_dir}: already holds a run; choose another, or go on with it by --resume")
        lock = lock_folder(args.out_dir)
        write_json(file, wanted)
        return lock
    old = read_object(file)
    for key in sorted((old.keys() | wanted.keys()) - {"out_dir", "device", "threads", "checkpointing"}):
        if wanted.get(key) != old.get(key):
            raise ValueError(f"--resume: {file} has {key} = {old.get(key)!r}, this command {key} = {wanted.get(key)!r}")
    return lock_folder(args.out_dir)


def save_state(out_dir, W, optimizer, state, records):
    if not parallel.leads():
        return
    whole = {"W": [w.detach() for w in W], "optimizer": optimizer.state_dict(), "state": state, "records": records}
    (out_dir / "state").mkdir(exist_ok=True)
    write_whole(out_dir / "state" / "state.pt", lambda part: torch.save(whole, part))


def load_state(out_dir, W, optimizer):
    """(state, records) as saved, W and the optimizer put back, the log cut to the steps they hold; or a fresh beginning."""
    file = out_dir / "state" / "state.pt"
    out_dir.mkdir(exist_ok=True)
    if not file.exists():
        if parallel.leads():
            (out_dir / "log.jsonl").unlink(missing_ok=True)
        return {"step": 0, "seconds": 0.0}, []
    try:
        whole = torch.load(file, weights_only=True, map_location=W[0].device)
    except Exception as error:                                          # torch.load raises half a dozen kinds
        raise ValueError(f"{file}: not a state that can be resumed ({error}); remove {out_dir} to begin anew") from None
    put(W, whole["W"])
    optimizer.load_state_dict(whole["optimizer"])
    if parallel.leads():
        log = (out_dir / "log.jsonl").read_text().splitlines(keepends=True)[:whole["state"]["step"]]
        write_whole(out_dir / "log.jsonl", lambda part: part.write_text("".join(log)))
    return whole["state"], whole["records"]
