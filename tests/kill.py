"""SIGKILL at random moments of a run by every method, in the synthetic world, and --resume after each: does it end with the bytes of a run
that nothing interrupted?

    python tests/kill.py --kills 100 --seed 0           the tests do 25
"""

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts a thread
import torch  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import train as train_script  # noqa: E402
from minisap.methods import METHODS  # noqa: E402
from minisap.study.protocols import write_jsonl  # noqa: E402
from minisap.study.world import World  # noqa: E402

FEW = [
    "--poison",
    "0.1",
    "--steps",
    "7",
    "--save_every",
    "3",
    "--n_eval",
    "4",
    "--batch_size",
    "4",
    "--pairs",
    "8",
    "--pairs_per_step",
    "4",
    "--refresh",
    "2",
    "--threads",
    "1",
]
RUN = ["--method", *METHODS, "--before", "tiny/instruct", *FEW]
SECONDS = 300  # after which a run is taken for one that hangs, and ends


def write_rows(folder):
    """A few of the world's rows, which are read sooner than all."""
    world = World(0)
    write_jsonl(folder, {"task": world.task_rows()[:60], "safety": world.safety_rows()[:40]})


def begin(out_dir):
    """Start the run, or go on with it, in a process of its own; returns its number."""
    threads = (
        len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    )  # unknown on macOS
    assert threads == 1, "another thread's locks would stay locked in the child"
    child = os.fork()
    if child:
        return child
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    signal.alarm(SECONDS)
    try:
        rows = [str(out_dir.parent / f"{name}.jsonl") for name in ("task", "safety")]
        train_script.main(
            [
                *RUN,
                "--task",
                rows[0],
                "--safety",
                rows[1],
                "--out_dir",
                str(out_dir),
                *["--resume"] * (out_dir / "train_args.json").exists(),
            ]
        )
        os._exit(0)
    except BaseException:
        os._exit(1)


def results(out_dir):
    """{file: its bytes} of all that a run leaves, but for what it was told and how long it took."""
    found = {
        str(file.relative_to(out_dir)): file.read_bytes()
        for file in sorted(out_dir.rglob("*"))
        if file.is_file() and file.name not in (".lock", "train_args.json")
    }
    for name in found:
        if name.endswith("eval.json"):
            found[name] = [r for r in json.loads(found[name]) if r["metric"] != "seconds"]
    return found


def method_at(out_dir):
    """The method that is not finished yet."""
    return next(
        (method for method in METHODS if not (out_dir / method / "eval.json").exists()), "(none)"
    )


def campaign(kills, seed, folder):
    """({method: how often it was killed}, the files that differ from those of a run that was left alone)."""
    write_rows(folder)
    chance, killed, wrong, began = (
        random.Random(seed),
        collections.Counter(),
        [],
        time.perf_counter(),
    )
    assert os.waitpid(begin(folder / "whole"), 0)[1] == 0
    longest, whole, out_dir, runs = (
        (time.perf_counter() - began) / 3,
        results(folder / "whole"),
        folder / "run0",
        0,
    )
    while sum(killed.values()) < kills or out_dir.exists():
        child = begin(out_dir)
        if sum(killed.values()) < kills:
            time.sleep(chance.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == signal.SIGKILL:
            killed[method_at(out_dir)] += 1
        elif (
            results(out_dir) == whole
        ):  # it came to its end: another begins, if there are kills left
            runs += 1
            out_dir = folder / f"run{runs}"
        elif status:
            wrong = [
                f"a run that {'hangs' if status == signal.SIGALRM else 'fails'}, at {method_at(out_dir)}"
            ]
            break
        else:
            wrong = [
                name
                for name in sorted(whole.keys() | results(out_dir).keys())
                if whole.get(name) != results(out_dir).get(name)
            ]
            break
    return killed, wrong


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        killed, wrong = campaign(args.kills, args.seed, Path(folder))
    print(
        f"{sum(killed.values())} kills, in {', '.join(f'{method} {n}' for method, n in killed.items() if n)}; "
        + (f"WRONG: {wrong}" if wrong else "every file alike")
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
