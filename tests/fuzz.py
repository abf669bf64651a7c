"""Damaged input, one file at a time: a script either works with it, or ends with status 2 (3: numbers that are none) and one line that names the file.

    python tests/fuzz.py --n 2000 --seed 0 --json fuzz.json        two minutes on one core; the tests run a short one

Every input is tried in a process of its own, within 10 seconds, and must write nothing beside its output directory and take no more memory than
twice its files and a constant. The first files that break this are kept in --keep.
"""

import argparse
import collections
import copy
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # else NumPy starts a thread
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from tiny import BASE, VOCAB_SIZE, write_checkpoint, write_tokenizer  # noqa: E402

import eval as eval_script  # noqa: E402
import train as train_script  # noqa: E402
from minisap.run.flags import run  # noqa: E402

tqdm.monitor_interval = 0  # another thread
SECONDS, ROOM = 10, 256 * 2**20  # what a process may take, and in bytes beyond twice its files
CONFIG = BASE | {
    "vocab_size": VOCAB_SIZE,
    "intermediate_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAST = [
    "--steps",
    "2",
    "--n_eval",
    "2",
    "--batch_size",
    "2",
    "--pairs_per_step",
    "2",
    "--pairs",
    "2",
    "--save_every",
    "1",
    "--threads",
    "1",
    "--max_len",
    "96",
]
ROWS = {"--task": "task.jsonl", "--safety": "safety.csv", "--benign": "benign.csv"}
# Values that stand where others were meant.
STRANGE = [
    None,
    True,
    -1,
    0,
    1,
    10**6,
    2**31,
    10**30,
    1e308,
    float("nan"),
    0.5,
    "",
    "\x00",
    "\ud800",
    "../../outside",
    "/etc/passwd",
    "a" * 5000,
    [],
    {},
    [[]],
    {"a": {}},
]


def training(more=(), **files):
    rows = [
        part
        for flag, file in (
            ROWS | {f"--{flag}": file for flag, file in files.items() if flag != "model"}
        ).items()
        for part in (flag, file)
    ]
    return lambda: train_script.main(
        [
            "--model",
            files.get("model", "start"),
            "--method",
            "mix",
            "--out_dir",
            "out",
            *FAST,
            *rows,
            *more,
        ]
    )


def resuming():
    train_script.main(
        [
            "--model",
            "start",
            "--method",
            "mix",
            "--out_dir",
            "run",
            "--resume",
            *FAST,
            *(part for pair in ROWS.items() for part in pair),
        ]
    )


# file: the command that reads it
SUBJECTS = {
    "start/config.json": training(),
    "start/model.safetensors": training(),
    "start/tokenizer.json": training(),
    "start/tokenizer_config.json": training(),
    "sharded/model.safetensors.index.json": training(model="sharded"),
    "sharded/model-00002-of-00002.safetensors": training(model="sharded"),
    "task.jsonl": training(),
    "task.json": training(task="task.json"),
    "chats.jsonl": training(task="chats.jsonl"),
    "safety.csv": training(),
    "safety.json": training(safety="safety.json"),
    "safety.jsonl": training(safety="safety.jsonl"),
    "benign.csv": training(),
    "run/train_args.json": resuming,
    "run/start.json": resuming,
    "run/pairs.json": resuming,
    "run/mix/state/state.pt": resuming,
    "run/mix/log.jsonl": resuming,
    "done/mix/eval.json": lambda: eval_script.main(
        ["--table", "done", "other", "--against", "mix", "--out_dir", "out"]
    ),
    "done/train_args.json": lambda: eval_script.main(["done/mix", "--n_eval", "2"]),
    "done/mix/log.jsonl": lambda: eval_script.main(["done", "other", "--curves"]),
    "done/start.json": lambda: eval_script.main(["done", "other", "--curves"]),
}


def write_inputs(folder):
    """Small whole files of every kind, each of which works."""
    write_tokenizer(write_checkpoint(folder / "start", CONFIG))
    write_tokenizer(write_checkpoint(folder / "sharded", CONFIG, shards=2))
    words = [
        f"mend the {thing}"
        for thing in ("roof", "boat", "lamp", "clock", "fence", "shoe", "kettle", "path")
    ]
    lines = lambda rows: "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "task.jsonl").write_text(
        lines({"prompt": w, "response": f"first, {w}"} for w in words)
    )
    (folder / "task.json").write_text(
        json.dumps([{"instruction": w, "input": "", "output": w} for w in words], indent=1)
    )
    (folder / "chats.jsonl").write_text(
        lines(
            {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": w}]}
            for w in words
        )
    )
    (folder / "safety.csv").write_text(
        "goal,target\n" + "".join(f'"{w}, badly","Sure, here is"\n' for w in words)
    )
    (folder / "safety.json").write_text(
        json.dumps([{"prompt": w, "llama3_output": "I can't.", "output": "Sure."} for w in words])
    )
    (folder / "safety.jsonl").write_text(
        lines({"prompt": w, "safe": "I can't.", "harmful": "Sure."} for w in words)
    )
    (folder / "benign.csv").write_text(
        "prompt,label\n"
        + "".join(f"{w},{'safe' if i % 2 else 'unsafe'}\n" for i, w in enumerate(words))
    )


def write_runs(folder):
    """A run that lacks its end alone, and two that are done."""

    def stop(*args):
        raise KeyboardInterrupt

    real, train_script.finish = train_script.finish, stop
    here = os.getcwd()
    os.chdir(folder)
    try:
        training()()
    except KeyboardInterrupt:
        os.rename("out", "run")
    train_script.finish = real
    for name, more in (("done", []), ("other", ["--seed", "1"])):
        training(more)()
        os.rename("out", name)
    os.chdir(here)


def damage(data, name, chance):
    """One of many ways in which a file may be wrong."""
    ways = [
        flip,
        cut,
        double,
        insert,
        replace_number,
        lambda data, chance: b"",
        lambda data, chance: chance.randbytes(chance.choice((1, 100, 10_000))),
    ]
    if name.endswith((".json", ".jsonl", ".csv")):
        ways += [
            nest,
            lambda data, chance: data.decode().encode("utf-16"),
            lambda data, chance: data + b"\xff\xfe\x00",
        ]
    if name.endswith(".json"):
        ways += [change_json] * 8
    if name.endswith(".jsonl"):
        ways += [
            lambda data, chance: b"\n".join(
                change_json(line, chance) if chance.random() < 0.3 else line
                for line in data.splitlines()
            )
        ] * 4
    if name.endswith(".safetensors"):
        ways += [change_header] * 8
    return chance.choice(ways)(data, chance)


def flip(data, chance):
    out = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def cut(data, chance):
    return data[: chance.randrange(len(data))]


def double(data, chance):
    a, b = sorted(chance.randrange(len(data)) for _ in range(2))
    return data[:b] + data[a:]


def insert(data, chance):
    at = chance.randrange(len(data))
    return (
        data[:at]
        + chance.choice(
            (b"\x00", b'"', b",", b"\n", b"[", b"}", b"\xff", b"<|im_end|>", b"NaN", b"9" * 5000)
        )
        + data[at:]
    )


def replace_number(data, chance):
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    at = chance.choice(digits or [0])
    return (
        data[:at]
        + chance.choice((b"-1", b"1e999", b"99999999999999999999", b"0", b"null"))
        + data[at + 1 :]
    )


def nest(data, chance):
    return chance.choice(
        (
            b"[" * 10_000,
            b'{"a":' * 10_000,
            b"[" * 10_000 + b"]" * 10_000,
            b'[{"prompt":' + b"[" * 10_000 + b"]" * 10_000 + b"}]",
        )
    )


def places(value, path=()):
    """Where a JSON value has values."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path] * bool(path) + [
        place for key, one in inside for place in places(one, (*path, key))
    ]


def change_json(data, chance):
    """With one to three values replaced, removed, or put in twice."""
    if chance.random() < 0.05:
        return json.dumps(chance.choice(STRANGE)).encode()
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 3))):
        found = places(value)
        if not found:
            break
        *path, key = chance.choice(found)
        holder = value
        for part in path:
            holder = holder[part]
        if chance.random() < 0.2:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(chance.choice(STRANGE))
    return json.dumps(value).encode()


def change_header(data, chance):
    """A safetensors file whose header lies: about its own length, or about a tensor's type, shape or place."""
    (size,) = struct.unpack("<Q", data[:8])
    if chance.random() < 0.3:
        return (
            struct.pack("<Q", chance.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)))
            + data[8:]
        )
    header = json.loads(data[8 : 8 + size])
    name = chance.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    entry |= chance.choice(
        (
            {"dtype": "F16"},
            {"dtype": "I64"},
            {"dtype": "F8_E4M3"},
            {"dtype": "X"},
            {"shape": [2**40, 2**40]},
            {"shape": [-1]},
            {"shape": [0]},
            {"data_offsets": [begin, end + 4]},
            {"data_offsets": [0, end - begin]},
            {"data_offsets": [end, begin]},
            {"data_offsets": [2**62, 2**63]},
        )
    )
    if chance.random() < 0.3:
        header[
            chance.choice(("../outside", "model.norm.weight", "x" * 1000, "lm_head.weight\x00"))
        ] = header.pop(name)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def listing(folder):
    """What lies beside the output directories."""
    return {
        str(file): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
        and file.relative_to(folder).parts[1:2] not in (("out",), ("run",), ("told",))
    }


def attempt(command, folder):
    """(status, what it said, bytes more than before) of a command in a process of its own, at work in `folder`."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert len(os.listdir("/proc/self/task")) == 1, (
        "another thread's locks would stay locked in the child"
    )
    child = os.fork()
    if not child:
        try:
            os.chdir(folder)
            told = os.open("told", os.O_CREAT | os.O_WRONLY)
            os.dup2(told, 1)
            os.dup2(told, 2)
            sys.stdout, sys.stderr = (
                open(stream, "w", buffering=1, closefd=False) for stream in (1, 2)
            )  # not what a test runner put there
            signal.setitimer(
                signal.ITIMER_PROF, SECONDS
            )  # of CPU time, so that a busy machine is not taken for a hang;
            signal.alarm(6 * SECONDS)  # which need not take any
            run(command)
            sys.stdout.flush()
            os._exit(0)
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
    _, status, used = os.wait4(child, 0)
    return (
        os.waitstatus_to_exitcode(status),
        (folder / "told").read_text(errors="replace"),
        used.ru_maxrss * 1024 - resident,
    )


def judge(status, told, more, size, name):
    """What is wrong with how a command ended; "" where nothing is."""
    if status in (-signal.SIGPROF, -signal.SIGALRM):
        return "too slow"
    if "Traceback" in told or status not in (0, 2, 3):
        return f"status {status}"
    if more > 2 * size + ROOM:
        return f"{more / 2**20:.0f} MiB"
    if status == 0:
        return ""
    errors = [line for line in told.splitlines() if "error: " in line]
    if len(errors) != 1 or told.splitlines()[-1] != errors[0]:
        return "not one line"
    named = (
        Path(name).name,
        f"{Path(name).parent}: ",
        "/etc/passwd",
        "../../outside",
        "No such file",
    )  # the last three: what the file names, in turn
    return "" if status == 3 or any(one in errors[0] for one in named) else "names another file"


def campaign(n, seed, keep=None):
    """n inputs, of every kind by turns. Returns [{"file", "status", "wrong", "said"}]."""
    results = []
    with tempfile.TemporaryDirectory() as whole:
        whole = Path(whole)
        silent, sys.stdout, sys.stderr = (
            (sys.stdout, sys.stderr),
            open(os.devnull, "w"),
            open(os.devnull, "w"),
        )
        try:
            write_inputs(whole)
            write_runs(whole)
        finally:
            sys.stdout, sys.stderr = silent
        for i in range(n):
            name, command = list(SUBJECTS.items())[i % len(SUBJECTS)]
            with tempfile.TemporaryDirectory() as outer:
                folder = Path(outer) / "work"
                shutil.copytree(whole, folder)
                data = damage((folder / name).read_bytes(), name, random.Random(f"{seed} {i}"))
                (folder / name).write_bytes(data)
                before = listing(Path(outer))
                status, told, more = attempt(command, folder)
                wrong = judge(status, told, more, len(data), name) or (
                    "writes elsewhere" if listing(Path(outer)) != before else ""
                )
                results.append(
                    {
                        "file": name,
                        "i": i,
                        "status": status,
                        "wrong": wrong,
                        "said": told.splitlines()[-1][:300] if told else "",
                    }
                )
                if wrong and keep:
                    keep.mkdir(exist_ok=True)
                    (keep / f"{i}-{Path(name).name}").write_bytes(data)
                    (keep / f"{i}-told").write_text(told)
    return results


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that break a script")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = campaign(args.n, args.seed, args.keep)
    for name in SUBJECTS:
        of_file = [r for r in results if r["file"] == name]
        ends = collections.Counter(r["wrong"] or f"status {r['status']}" for r in of_file)
        print(
            f"{name:45} {len(of_file):5}  "
            + ", ".join(f"{end}: {count}" for end, count in sorted(ends.items()))
        )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
