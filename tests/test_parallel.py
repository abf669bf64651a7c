"""Two processes against one with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minisap.support import distributed as parallel

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["sft", "sap", "paper_project", "mix", "lisa", "constrained", "booster"]
FAST = [
    "--steps",
    "3",
    "--n_eval",
    "4",
    "--save_every",
    "2",
    "--batch_size",
    "5",
    "--pairs_per_step",
    "3",
    "--dtype",
    "float64",
]


def by_two(out_dir, *more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        str(ROOT / "train.py"),
        "--out_dir",
        str(out_dir),
        *FAST,
        *more,
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def check_same(one, two, method):
    """Weights and logs, to rounding in float64."""
    weights, logs = zip(
        *(
            (
                load_file(out / method / "model.safetensors"),
                [json.loads(line) for line in open(out / method / "log.jsonl")],
            )
            for out in (one, two)
        )
    )
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-9, atol=1e-12)
    assert len(logs[0]) == 3
    for a, b in zip(*logs):
        assert a == pytest.approx(b)


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """In float64, to rounding; 5 rows and 3 pairs do not split evenly. One of them writes."""
    done = by_two(tmp_path / "two", "--method", *METHODS)
    assert done.returncode == 0 and done.stdout.count("written: ") == 1, done.stderr[-2000:]
    train.main(["--out_dir", str(tmp_path / "one"), *FAST, "--method", *METHODS])
    for method in METHODS:
        check_same(tmp_path / "one", tmp_path / "two", method)


def test_a_process_may_have_no_row_at_all(tmp_path):
    """One row and one pair a step, and a filter that leaves some steps without any; then taken up again where all steps are done but the end."""
    few = [
        "--batch_size",
        "1",
        "--pairs_per_step",
        "1",
        "--poison",
        "0.5",
        "--method",
        "sap",
        "paper_project",
    ]
    done = by_two(tmp_path / "two", *few)
    assert done.returncode == 0, done.stderr[-2000:]
    train.main(["--out_dir", str(tmp_path / "one"), *FAST, *few])
    for method in ("sap", "paper_project"):
        check_same(tmp_path / "one", tmp_path / "two", method)
    assert {
        json.loads(line)["left_out"] for line in open(tmp_path / "one" / "sap" / "log.jsonl")
    } == {0, 1}


def test_a_run_that_lacks_its_end_alone_is_taken_up_by_two(tmp_path, monkeypatch):
    """The lead, who has nothing left to do, removes the state when the other has read it."""
    monkeypatch.setattr(train, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--out_dir", str(tmp_path / "run"), *FAST, "--method", "sft"])
    done = by_two(tmp_path / "run", "--method", "sft", "--resume")
    assert done.returncode == 0 and (tmp_path / "run" / "sft" / "eval.json").exists(), done.stderr[
        -2000:
    ]


def test_what_the_lead_alone_finds_wrong_is_one_line(tmp_path):
    train.main(["--out_dir", str(tmp_path / "run"), *FAST, "--method", "sft"])
    done = by_two(tmp_path / "run", "--method", "sft", "--resume", "--batch_size", "4")
    assert (
        done.returncode != 0
        and done.stderr.count("error: --resume: ") == 1
        and "[rank1]" not in done.stderr
    ), done.stderr


def test_what_cannot_be_split_is_refused(tmp_path):
    done = by_two(tmp_path / "two", "--method", "kl")
    assert (
        done.returncode != 0
        and done.stderr.count("error: kl looks at more than the losses of rows") == 1
        and not (tmp_path / "two").exists()
    )


def test_shares_are_everything_once(monkeypatch):
    monkeypatch.setattr(parallel, "splits", True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 3)
    for n in range(8):
        assert [i for share in parallel.shares(n) for i in range(n)[share]] == list(range(n))
