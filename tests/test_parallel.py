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
from minisap import parallel

ROOT = Path(__file__).resolve().parents[1]
METHODS = ["sft", "sap", "paper_project", "mix", "lisa", "constrained", "booster"]
FAST = ["--steps", "3", "--n_eval", "4", "--save_every", "2", "--batch_size", "5", "--pairs_per_step", "3", "--dtype", "float64"]


def by_two(out_dir, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"), "--out_dir", str(out_dir), *FAST, *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """In float64, to rounding; 5 rows and 3 pairs do not split evenly. One of them writes."""
    done = by_two(tmp_path / "two", "--method", *METHODS)
    assert done.returncode == 0 and done.stdout.count("written: ") == 1, done.stderr[-2000:]
    train.main(["--out_dir", str(tmp_path / "one"), *FAST, "--method", *METHODS])
    for method in METHODS:
        one, two = (load_file(tmp_path / name / method / "model.safetensors") for name in ("one", "two"))
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12)
        logs = [[json.loads(line) for line in open(tmp_path / name / method / "log.jsonl")] for name in ("one", "two")]
        assert len(logs[0]) == 3
        for a, b in zip(*logs):
            assert a == pytest.approx(b)


def test_what_cannot_be_split_is_refused(tmp_path):
    done = by_two(tmp_path / "two", "--method", "kl")
    assert done.returncode != 0 and done.stderr.count("error: kl looks at more than the losses of rows") == 1 and not (tmp_path / "two").exists()


def test_shares_are_everything_once(monkeypatch):
    monkeypatch.setattr(parallel, "splits", True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 3)
    for n in range(8):
        assert [i for share in parallel.shares(n) for i in range(n)[share]] == list(range(n))
