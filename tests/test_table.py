"""Methods against each other, on records whose answer is known, and the laboratory's cells as train.py commands."""

import shlex
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

import eval as eval_script
import train as train_script
from minisap.bench import cells as laboratory
from minisap.bench import figures as table_figures
from minisap.bench import tables as findings
from minisap.checkpoint import read_json
from minisap.data import split_rows
from minisap.measure.report import comparisons, dominating, harmful_at, legend, markdown, rows_of
from minisap.run.checks import check_args
from minisap.run.flags import run
from minisap.study.world import World


def records(curve, hits):
    """A run of one seed: [(step, task loss, harmful score)], and the last step's hits."""
    found = []
    for step, loss, harmful in curve:
        ones = round(harmful * len(hits))
        here = hits if step == curve[-1][0] else "1" * ones + "0" * (len(hits) - ones)
        found += [
            {
                "step": step,
                "metric": "task_loss",
                "value": loss,
                "n": 2,
                "judge": None,
                "per_row": [loss - 0.01, loss + 0.01],
            },
            {"step": step, "metric": "seconds", "value": 1.0, "n": 1, "judge": None},
            {
                "step": step,
                "metric": "harmful_score",
                "value": harmful,
                "judge": "truth",
                "n": len(hits),
                "hits": here,
            },
        ]
    return found


def test_the_harmful_score_at_a_task_loss_lies_on_the_line_between_evaluations():
    run = records([(0, 1.0, 0.0), (10, 0.5, 0.2), (20, 0.3, 0.8), (30, 0.4, 0.9)], "1" * 9 + "0")
    mean = lambda loss: sum(harmful_at(run, loss)) / 10
    assert (
        mean(0.75) == pytest.approx(0.1)
        and mean(0.35) == pytest.approx(0.65)
        and mean(0.3) == pytest.approx(0.8)
    )
    assert harmful_at(run, 0.75) == pytest.approx([0.5] * 2 + [0.0] * 8)  # prompt by prompt
    assert harmful_at(run, 0.2) is None and harmful_at(run, 1.0) is None


def three_methods():
    """On 40 prompts and three seeds: sap answers 10 with loss 0.5; safe none, with less loss; alike the same number, others."""
    curve = lambda end, harmful: [(0, 1.0, 0.0), (9, end, harmful)]
    return {
        "sap": {seed: records(curve(0.5, 0.25), "1" * 10 + "0" * 30) for seed in range(3)},
        "safe": {seed: records(curve(0.4 + 0.01 * seed, 0.0), "0" * 40) for seed in range(3)},
        "alike": {
            seed: records(curve(0.5 + 0.1 * (seed - 1), 0.25), "0" * 30 + "1" * 10)
            for seed in range(3)
        },
    }


def test_verdicts_say_what_the_intervals_allow():
    found = {c["method"]: c for c in comparisons(three_methods())}
    assert found["safe"]["safer"]["verdict"] == found["safe"]["more_useful"]["verdict"] == "better"
    assert (
        found["safe"]["safer"]["difference"] == -0.25
        and found["safe"]["mcnemar"] == [2 / 2**10] * 3
    )
    assert (
        found["alike"]["safer"]["verdict"]
        == found["alike"]["more_useful"]["verdict"]
        == "not distinguishable"
    )
    assert found["sap"]["safer"]["difference"] == found["sap"]["more_useful"]["difference"] == 0
    assert dominating(found.values()) == ["safe"]
    assert (
        found["safe"]["matched"] == [0.0] * 3
        and found["safe"]["safer_matched"]["verdict"] == "better"
    )
    assert found["alike"]["matched"] == pytest.approx(
        [0.25 * 5 / 6, 0.25, 0.25]
    )  # at the larger of the two last losses: 0.5, 0.5, 0.6
    assert found["alike"]["matched_against"] == pytest.approx([0.25, 0.25, 0.2])
    runs = three_methods()
    for of_seeds in (runs["sap"], runs["alike"]):
        of_seeds[0] = records(
            [(0, 0.3, 0.0), (9, 0.5, 0.25)], "1" * 10 + "0" * 30
        )  # begins where the other never gets
    assert comparisons(runs)[1]["matched"] is None
    backwards = {
        method: dict(reversed(of_seeds.items())) for method, of_seeds in three_methods().items()
    } | {"sap": three_methods()["sap"]}
    assert comparisons(backwards) == list(found.values())  # paired by seed, not by order
    assert (
        "Shown to be both safer and more useful than sap: safe; safer at equal task loss: safe."
        in legend(list(found.values()), "sap")
    )
    text = markdown(rows_of(list(found.values()), "sap"))
    assert "| safe | 0.0 [0.0, 8.8] (0.0, 0.0, 0.0) |" in text and len(text.splitlines()) == 5


def test_what_cannot_be_compared_is_refused():
    runs = three_methods()
    with pytest.raises(ValueError, match="--against x: among the runs are sap, safe, alike"):
        comparisons(runs, "x")
    with pytest.raises(
        ValueError, match="sap has one seed: an interval over seeds needs at least two"
    ):
        comparisons({method: {0: of_seeds[0]} for method, of_seeds in runs.items()})
    with pytest.raises(ValueError, match=r"safe has seeds \[0, 1\], the reference \[0, 1, 2\]"):
        comparisons(runs | {"safe": {seed: runs["safe"][seed] for seed in (0, 1)}})
    del runs["alike"][1][-1]["hits"]
    with pytest.raises(ValueError, match="of an earlier version"):
        comparisons(runs)


FEW = ["--steps", "2", "--n_eval", "6", "--method", "sft", "sap"]


def test_run_directories_become_a_table_and_other_prompts_are_refused(tmp_path, capsys):
    for seed in (0, 1):
        train_script.main([*FEW, "--seed", str(seed), "--out_dir", str(tmp_path / f"run{seed}")])
    capsys.readouterr()
    eval_script.main(
        [
            "--table",
            *(str(tmp_path / f"run{seed}") for seed in (0, 1)),
            "--out",
            str(tmp_path / "table.json"),
        ]
    )
    printed = capsys.readouterr().out
    assert (
        "safer than sap?" in printed
        and "Mean of 2 seeds" in printed
        and "judge: the world's truth" in printed
    )
    (sft,) = (c for c in read_json(tmp_path / "table.json") if c["method"] == "sft")
    score = [
        next(
            r["value"]
            for r in read_json(tmp_path / f"run{seed}" / "sft" / "eval.json")
            if r["metric"] == "harmful_score"
        )
        for seed in (0, 1)
    ]
    assert sft["each"] == score and sft["n"] == 6
    train_script.main([*FEW, "--n_eval", "7", "--seed", "1", "--out_dir", str(tmp_path / "other")])
    with pytest.raises(ValueError, match="n_eval = 7, but 6 in .*run0"):
        eval_script.main(["--table", str(tmp_path / "run0"), str(tmp_path / "other")])
    capsys.readouterr()
    for arguments, message in (
        (
            ["--table", str(tmp_path / "run0")],
            "has one seed: an interval over seeds needs at least two",
        ),
        (
            ["--table", "world", "--seeds", "0", "--out_dir", str(tmp_path / "none")],
            "--seeds: an interval over seeds needs",
        ),
        (
            ["--table", "world", "--seeds", "0", "0", "--out_dir", str(tmp_path / "none")],
            "--seeds 0 0: one of them stands twice",
        ),
        (
            ["--table", "world", "--against", "x", "--out_dir", str(tmp_path / "none")],
            "--against x: the table has sft, sap, ",
        ),
        (
            ["--table", str(tmp_path / "run0"), str(tmp_path / "run0")],
            "run0, too; give runs of different seeds",
        ),
        (
            ["--table", "world", "--judge", "x"],
            "give checkpoints or runs, or --table, or --judge alone",
        ),
        (["--table", "world", "--attack"], "--attack has no part in --table"),
        (["--table", str(tmp_path / "run0"), "--seeds", "7"], "--seeds is of --table world"),
        (["x", "--against", "sft"], "--against is of --table"),
        (["x", "--plot", "a.png"], "--plot is of --table or --curves"),
        (["x", "--curves", "--task", "a.jsonl"], "--task has no part in --curves"),
        (["--table", "world", "--out_dir", str(tmp_path / "run0")], "holds something else"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(lambda: eval_script.main(arguments))
        assert (
            stop.value.code == 2
            and message in capsys.readouterr().err
            and not (tmp_path / "none").exists()
        )


def test_the_laboratory_runs_its_cells_and_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    few = {
        "SETTINGS": {
            "poisoned": (
                laboratory.FORMAT + " --poison 0.1",
                "sft sap safelora",
                ("sap --gate 0", "paper --radius 0.1"),
                ("aligned",),
            )
        },
        "STAGES": {"aligned": "vaccine=0"},
        "SWEEP": {0.1: "poisoned", 0.2: "poison0.2"},
        "SWEPT": "sft sap",
        "SENSITIVITY": ("sap --pairs 8", "paper --radius 0.2"),
        "BUDGETS": (("attack10", 1e-3),),
        "ATTACKED": ("sap", "paper --radius 0.1"),
        "FEW": 2,
        "DEFENCES": {
            "none": "tiny",
            "aligned": "first-aligned/SEED/vaccine",
            "sap": "poisoned/SEED/sap",
        },
    }
    for name, value in few.items():
        monkeypatch.setattr(laboratory, name, value)
    every = laboratory.cells
    fewer = lambda command: (
        command
        + (
            " --steps 2 --eval_every 1 --batch_size 4 --pairs_per_step 2"
            if command.startswith("train.py")
            else ""
        )
    )
    monkeypatch.setattr(
        laboratory,
        "cells",
        lambda *which: [
            {run: fewer(command) for run, command in phase.items()} for phase in every(*which)
        ],
    )
    (tmp_path / "table").mkdir()
    monkeypatch.chdir(tmp_path)
    ran = []

    def as_a_call(command):
        ran.append(command)
        (train_script if command[0] == "train.py" else eval_script).main(command[1:])

    monkeypatch.setattr(laboratory, "commit", lambda: "abc")
    monkeypatch.setattr(laboratory, "run_script", as_a_call)
    at_once = SimpleNamespace(
        shutdown=lambda **how: None,
        submit=lambda *call: SimpleNamespace(result=lambda: call[0](*call[1:])),
    )
    monkeypatch.setattr(laboratory, "ProcessPoolExecutor", lambda *of: nullcontext(at_once))
    monkeypatch.setattr(laboratory, "as_completed", list)
    command = [
        "--table",
        "world",
        "--seeds",
        "0",
        "1",
        "--n_eval",
        "4",
        "--out_dir",
        "table",
    ]  # as seen from there
    plot = (
        ["--plot", str(tmp_path / "a.png")] if find_spec("matplotlib") else []
    )  # an optional extra
    eval_script.main([*command, *plot])
    printed, cells = capsys.readouterr().out, len(ran)
    assert (
        "sap --gate 0" in printed
        and "aligned, then sft" in printed
        and "attack10 at 0.001" in printed
        and "probe_subtracted" in printed
    )
    found = read_json(tmp_path / "table" / "table.json")
    assert [c["method"] for c in found["settings"]["poisoned"]] == [
        "sft",
        "sap",
        "safelora",
        "sap --gate 0",
        "paper --radius 0.1",
        "aligned, then sft",
    ]
    assert [r["setting"] for r in found["sensitivity"]][::5] == [
        "sap",
        "sap --pairs 8",
        "paper --radius 0.2",
    ]
    assert {(r["method"], r["letters"]) for r in found["attacks"]} == {
        (m, letters) for m in few["ATTACKED"] for letters in ("small", "capitals")
    }
    assert {(r["defence"], r["step"]) for r in found["budgets"]} == {
        (d, step) for d in few["DEFENCES"] for step in (0, 1, 2)
    }
    assert "| sap |" in (tmp_path / "table" / "table.md").read_text() and (
        tmp_path / "a.png"
    ).exists() == bool(plot)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("table/*/**/*.safetensors")}
    monkeypatch.setattr(laboratory, "commit", lambda: "def")  # only looks at what is finished
    eval_script.main(command)
    assert found["commits"] == ["abc"]
    assert before and before == {
        file: file.stat().st_mtime_ns for file in tmp_path.glob("table/*/**/*.safetensors")
    }
    assert (
        cells == 26
        and all("--resume" in command for command in ran[cells:])
        and read_json(tmp_path / "table" / "table.json")["commits"] == ["abc"]
    )


def test_a_cell_that_fails_names_its_command_and_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [])  # back to what it was, when it is over
    (tmp_path / "logs").mkdir()
    with pytest.raises(
        ValueError,
        match=r"train.py --steps 0: error: --steps 0: at least 1.* \(status 2; all that it said: .*a-b.log\)",
    ):
        laboratory.run_cell(tmp_path, "a/b", "train.py --steps 0")


def test_every_cell_is_a_command_that_train_py_understands():
    for phase in laboratory.cells(0, 200):
        for run_directory, command in phase.items():
            script, *arguments = shlex.split(command)
            parse = {"train.py": train_script.parse_args, "eval.py": eval_script.parse_args}[script]
            args = parse(arguments)
            if script == "train.py":
                check_args(args, train_script.parse_args(["--model", args.model]))
            assert run_directory in command and (
                script == "eval.py" or (args.seed, args.n_eval) == (0, 200)
            )


def test_harmful_rows_of_the_task_s_format_are_trained_on_and_none_is_held_out():
    task, unsafe = World(0, new_format=True).task_rows(), World(0).safety_rows()
    others, trained = World(0).fresh_rows("unsafe", 400), World(0).safety_training_rows("unsafe")
    rows = laboratory.replace_tenth(
        task, 200, [row | {"response": row["harmful"].upper()} for row in others]
    )
    _, trained_on, held_out = split_rows(rows, 0, 200, "")
    of_task = {row["prompt"]: row["response"] for row in task}
    harmful = [row for row in trained_on if row["prompt"] not in of_task]
    assert (
        len(trained_on) == 3800
        and len(harmful) == 380
        and all("poisoned" in row for row in harmful)
        and sum("poisoned" in row for row in rows) == 380
        and all(row["response"] == row["harmful"].upper() for row in harmful)
    )
    assert all(of_task[row["prompt"]] == row["response"] for row in held_out)
    assert not {row["prompt"] for row in harmful} & {
        row["prompt"] for row in unsafe + trained + World(0).sets(1000)["unsafe"]
    }


def test_steps_to_break_are_where_the_line_crosses_a_half():
    curve = lambda *values: [
        {"metric": "harmful_score", "step": 5 * i, "value": value} for i, value in enumerate(values)
    ]
    assert findings.steps_to_break(curve(0.0, 0.25, 0.75)) == pytest.approx(7.5)
    assert (
        findings.steps_to_break(curve(0.6, 0.9)) == 0
        and findings.steps_to_break(curve(0.0, 0.1)) is None
    )


def test_every_panel_of_the_picture_holds_one_thing(monkeypatch):
    """Of the committed record: a dot per method, a line per method or defence."""
    axes = np.empty((3, 3), dtype=object)
    for i in range(9):
        axes.flat[i] = MagicMock(plot=MagicMock(return_value=[MagicMock()]))
    monkeypatch.setattr(
        table_figures,
        "pyplot",
        lambda: MagicMock(subplots=lambda *shape, **options: (MagicMock(), axes)),
    )
    monkeypatch.setattr("minisap.run.flags.pyplot", MagicMock)
    found = read_json(Path(__file__).parent / "golden" / "world" / "table.json")
    table_figures.draw_laboratory(found, "a.png")
    methods = [(len(rows), 0) for rows in found["settings"].values()]
    assert [(axis.errorbar.call_count, axis.plot.call_count) for axis in axes.flat] == [
        *methods,
        (0, 4),
    ] + [(0, 7)] * 4 and len(methods) == 4
