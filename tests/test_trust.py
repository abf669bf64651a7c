"""A run on a shared machine, fed with files from strangers: killed, cut off at any of its writes, and given damaged input."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import SUBJECTS
from kill import FEW, results, write_rows

import train as train_script
from minisap import checkpoint
from minisap.run import resume
from minisap.run.flags import run

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments, **more):
    """A Python of its own, started at the root."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        **more,
    )


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_bytes():
    """25 times, wherever in the run of every method that may be."""
    done = python("tests/kill.py", "--kills", 25)
    assert done.returncode == 0 and re.fullmatch(
        r"25 kills, in [\w ]+(, [\w ]+){5,}; every file alike\n", done.stdout
    ), done.stdout + done.stderr


def test_saving_takes_no_more_than_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """By a clock of our own: a step takes a second, as does a save. After the first, at step 2, the next is due 19 seconds later, at an even step."""
    clock, saved, real, update = [0.0], [], resume.write_whole, train_script.update

    def slow(path, write):
        if path.name == "state.pt":
            clock[0] += 1
            saved.append(clock[0])
        return real(path, write)

    monkeypatch.setattr(resume, "write_whole", slow)
    monkeypatch.setattr(
        train_script, "update", lambda *args: clock.__setitem__(0, clock[0] + 1) or update(*args)
    )
    for module in (resume, train_script):
        monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    train_script.main(
        [
            *FEW,
            "--method",
            "sap",
            "--steps",
            "50",
            "--save_every",
            "2",
            "--out_dir",
            str(tmp_path / "run"),
        ]
    )
    assert saved == [3, 24, 45, 54]


class Killed(BaseException):
    """Stands for a SIGKILL, which nothing catches."""


def test_a_run_that_ends_at_any_of_its_writes_goes_on(tmp_path, monkeypatch):
    """Whichever file is on its way: written under another name, and not yet, or just, given its own."""
    write_rows(tmp_path)
    arguments = [
        "--method",
        "sap",
        *FEW,
        "--task",
        str(tmp_path / "task.jsonl"),
        "--safety",
        str(tmp_path / "safety.jsonl"),
    ]
    train = lambda out_dir, *more: train_script.main([*arguments, "--out_dir", str(out_dir), *more])
    train(tmp_path / "whole")
    whole, real = results(tmp_path / "whole"), checkpoint.write_whole
    for after in (False, True):
        write = 0
        while True:
            write, calls, out_dir = write + 1, [], tmp_path / f"{after}{write}"

            def cut_off(path, writer):
                calls.append(path)
                if len(calls) < write:
                    return real(path, writer)
                if after:
                    real(path, writer)
                else:
                    writer(path.with_name(path.name + ".part"))
                raise Killed

            for module in (checkpoint, resume):
                monkeypatch.setattr(module, "write_whole", cut_off)
            try:
                train(out_dir)
            except Killed:
                pass
            for module in (checkpoint, resume):
                monkeypatch.setattr(module, "write_whole", real)
            if len(calls) < write:
                break
            train(out_dir, *["--resume"] * (out_dir / "train_args.json").exists())
            assert results(out_dir) == whole, calls[-1]
            shutil.rmtree(out_dir)
        assert write > 12


def test_damaged_files_are_refused_by_one_line_that_names_them(tmp_path):
    done = python(
        "tests/fuzz.py", "--n", 2 * len(SUBJECTS), "--seed", 1, "--json", tmp_path / "found.json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not [r for r in found if r["wrong"]]
    assert {r["status"] for r in found} >= {0, 2} and {r["file"] for r in found} == set(SUBJECTS)


LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)); sys.argv.pop(0); runpy.run_path('train.py', run_name='__main__')"


def test_a_disk_that_is_full_ends_the_run_and_not_its_last_state(tmp_path):
    """There is room for the state of LoRA, but not for the model that is written in the end."""
    arguments = ["--method", "sap", *FEW, "--lora_rank", "2"]
    done = python("-c", LIMITED, "train.py", *arguments, "--out_dir", tmp_path / "run")
    assert (
        done.returncode == 2
        and "error: " in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    ), done.stderr
    assert (tmp_path / "run/sap/state/state.pt").exists() and not (
        tmp_path / "run/sap/model.safetensors"
    ).exists()
    train_script.main([*arguments, "--out_dir", str(tmp_path / "run"), "--resume"])
    train_script.main([*arguments, "--out_dir", str(tmp_path / "whole")])
    assert results(tmp_path / "run") == results(tmp_path / "whole")


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_where_nothing_can_be_written_is_one_line(place, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: train_script.main([*FEW, "--method", "sap", "--out_dir", place]))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and line.startswith("error: ") and place in line


def test_a_terminal_without_utf_8_gets_the_table_all_the_same():
    """It has a κ."""
    for arguments, told in (
        (
            ["eval.py", "tests/golden/smollm2/p0-seed1", "--curves"],
            "judge: phrases-2, in the first 100 characters; ? 0.90",
        ),
        (["train.py", "--help"], "--safety_weight"),
    ):
        done = python(*arguments, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0 and told in done.stdout, done.stderr


IN_LITTLE_ROOM = """
import resource, sys, train
from pathlib import Path
from minisap.run.flags import run
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
train.check_memory = lambda *args: None                             # which would ask for it sooner, and end alike
run(lambda: train.main(sys.argv[1:]))
"""


def test_a_cpu_without_enough_memory_says_what_was_needed_and_what_lowers_it(tmp_path):
    done = python(
        "-c",
        IN_LITTLE_ROOM,
        "--steps",
        2,
        "--n_eval",
        4,
        "--method",
        "sft",
        "--batch_size",
        20000,
        "--threads",
        1,
        "--out_dir",
        tmp_path / "run",
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        r"error: .*you tried to allocate \d+ bytes.* Shorter --max_len, smaller batches, --checkpointing",
        done.stderr.splitlines()[-1],
    )
