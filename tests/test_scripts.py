"""train.py, eval.py and probe.py in-process on a tiny checkpoint: what they write, resume, and what they refuse."""

import io
import json
import re
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import BASE, VOCAB_SIZE, write_checkpoint, write_tokenizer

import eval as eval_script
import probe as probe_script
import train as train_script
from minisap import sap
from minisap.checkpoint import load_model, read_json
from minisap.lora import add_lora
from minisap.run import resume
from minisap.run.checks import check_args
from minisap.run.flags import parse_layers, run
from minisap.study import layers
from minisap.study.world import World, write_random_checkpoint
from minisap.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
FAST = [
    "--steps",
    "4",
    "--n_eval",
    "6",
    "--batch_size",
    "2",
    "--pairs_per_step",
    "2",
    "--pairs",
    "4",
    "--save_every",
    "2",
    "--threads",
    "1",
]


@pytest.fixture
def start(tmp_path):
    return write_tokenizer(write_checkpoint(tmp_path / "start", BASE | {"vocab_size": VOCAB_SIZE}))


def train(start, out_dir, *more):
    train_script.main(["--model", str(start), "--out_dir", str(out_dir), *FAST, *more])
    return out_dir


def test_methods_start_alike_and_leave_checkpoints_that_are_read_again(start, tmp_path, capsys):
    out = train(start, tmp_path / "run", "--method", "sft", "paper_project", "--eval_every", "2")
    printed = capsys.readouterr().out
    assert "794 task rows, 79 of them marked as poisoned; 4 contrastive pairs" in printed
    sft, probed = (read_json(out / method / "eval.json") for method in ("sft", "paper_project"))
    assert {r["step"] for r in sft} == {2, 4} and {r["method"] for r in probed} == {"paper_project"}
    assert {"model", "method", "seed", "metric", "value", "n", "ci_low", "ci_high", "judge"} <= sft[
        0
    ].keys()
    assert {
        "harmful_score",
        "refusal_rate",
        "other_rate",
        "harm_margin",
        "over_refusal",
        "task_loss",
        "seconds",
    } == {r["metric"] for r in sft}
    first = [
        json.loads((out / m / "log.jsonl").read_text().splitlines()[0])["loss"]
        for m in ("sft", "paper_project")
    ]
    assert (
        first[0] == pytest.approx(first[1], rel=0.05) and first[0] != first[1]
    )  # the same rows, with a probe
    assert load_model(out / "paper_project").config == load_model(start).config


def test_the_merged_checkpoint_is_the_start_with_its_adapter(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sft")
    model = load_model(start)
    add_lora(model, r=8, alpha=16)
    adapter = load_file(out / "sft" / "adapter" / "adapter_model.safetensors")
    names = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in adapter.items()
    }
    model.load_state_dict(names, strict=False)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(load_model(out / "sft")(ids), model(ids))
    assert not torch.equal(load_model(out / "sft")(ids), load_model(start)(ids))


@pytest.mark.parametrize(
    "method", ["sap", "paper_project", "released", "lisa", "constrained", "ema"]
)
@pytest.mark.parametrize("more", [["--eval_every", "1"], ["--lora_rank", "0"]])
def test_a_resumed_run_ends_bit_identical(method, more, start, tmp_path, monkeypatch):
    more = [
        *more,
        *["--gate", "1e-9"] * (method == "sap"),
        *["--refresh", "3"] * (method in ("sap", "paper_project")),
    ]
    whole = train(start, tmp_path / "whole", "--method", method, *more)
    step_batches, calls = train_script.step_batches, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:  # in the third step
            raise KeyboardInterrupt
        return step_batches(*args, **kwargs)

    monkeypatch.setattr(train_script, "step_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "cut", "--method", method, *more)
    monkeypatch.undo()
    cut = train(start, tmp_path / "cut", "--method", method, "--resume", *more)
    assert (cut / method / "model.safetensors").read_bytes() == (
        whole / method / "model.safetensors"
    ).read_bytes()
    assert (cut / method / "log.jsonl").read_text() == (whole / method / "log.jsonl").read_text()
    assert method != "sap" or any(
        json.loads(line)["left_out"] for line in (cut / method / "log.jsonl").open()
    )  # by the first step's weights
    cut, whole = (
        [r for r in read_json(out / method / "eval.json") if r["judge"] or "loss" in r["metric"]]
        for out in (cut, whole)
    )
    assert cut == whole and len(whole) == (20 if "--eval_every" in more else 5)


def test_rows_are_chosen_once_and_not_again_by_who_resumes(start, tmp_path, monkeypatch):
    choose, asked = train_script.FILTERS["sap"], []
    monkeypatch.setitem(
        train_script.FILTERS, "sap", lambda *args: asked.append(args) or choose(*args)
    )
    monkeypatch.setattr(train_script, "finish", lambda *args: 1 / 0)  # all steps are done and saved
    with pytest.raises(ZeroDivisionError):
        train(start, tmp_path / "run", "--method", "sap")
    monkeypatch.undo()
    monkeypatch.setitem(train_script.FILTERS, "sap", lambda *args: 1 / 0)
    file = tmp_path / "run/sap/state/state.pt"
    saved, whole = file.read_bytes(), torch.load(file, weights_only=True)
    del whole["state"]["kept"]  # as if a version had saved it that calls it otherwise
    torch.save(whole, file)
    with pytest.raises(
        ValueError, match="run/sap: was saved by another version's filter; remove it to begin anew"
    ):
        train(start, tmp_path / "run", "--method", "sap", "--resume")
    file.write_bytes(saved)
    assert (
        train(start, tmp_path / "run", "--method", "sap", "--resume") / "sap" / "eval.json"
    ).exists() and len(asked) == 1


def test_how_many_poisoned_rows_are_left_out_is_told(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        train_script.FILTERS,
        "sap",
        lambda model, W, task, contrast, args: [i >= 40 for i in range(len(task))],
    )
    examples = train_script.prepare(
        train_script.parse_args(["--model", str(start), "--poison", "0.1", *FAST])
    )[-1]
    poisoned = [example["poisoned"] for example in examples]
    train(start, tmp_path / "run", "--method", "sap", "--poison", "0.1")
    marked, n = sum(poisoned), len(poisoned)
    told = f"{sum(poisoned[:40])} of the {marked} marked as poisoned, {40 - sum(poisoned[:40])} of the {n - marked} others"
    assert (
        f"sap leaves out 40 of the {n} task rows of its 4 steps: {told}\n"
        in capsys.readouterr().out
    )
    assert read_json(tmp_path / "run/sap/filter.json") == {
        "rows": len(poisoned),
        "left_out": 40,
        "poisoned": sum(poisoned),
        "poisoned_left_out": sum(poisoned[:40]),
        "sources_left_out": [example["source"] for example in examples[:40]],
    }
    assert 0 < sum(poisoned[:40]) < 40 and sum(poisoned) == round(len(poisoned) / 10)


@pytest.mark.parametrize("share, warned", [(0.2, False), (0.3, True)])
def test_who_loses_many_rows_that_nobody_marked_is_told_which(
    share, warned, start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(
        train_script.FILTERS,
        "sap",
        lambda model, W, task, contrast, args: [i >= share * len(task) for i in range(len(task))],
    )
    train(start, tmp_path / "run", "--method", "sap", "--poison", "0")
    printed = capsys.readouterr().out
    assert re.search(
        r"sap leaves out \d+ of the 794 task rows of its 4 steps\n", printed
    )  # of none is it known that it is poisoned
    assert (
        f"of the 794 rows that nobody marked as poisoned are left out ({tmp_path / 'run/sap/filter.json'} says which)"
        in printed
    ) == warned


def test_a_method_s_own_mistake_keeps_its_traceback(start, tmp_path, monkeypatch):
    def mine(model, W, batch, contrast, args, state):
        _loss, _log = 1, 2, 3  # a ValueError, as wrong input is one, too

    monkeypatch.setitem(train_script.METHODS, "sft", mine)
    with pytest.raises(RuntimeError, match="--method sft: too many values to unpack") as caught:
        run(lambda: train(start, tmp_path / "run", "--method", "sft"))
    assert traceback.extract_tb(caught.value.__cause__.__traceback__)[-1].name == "mine"


def test_a_method_joins_a_run_that_has_another_s_flags(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sap", "--gate", "0.1")
    with pytest.raises(ValueError, match="gate = 0.1, this command gate = 0.5"):
        train(start, out, "--method", "mix", "--resume")
    assert (
        train(start, out, "--method", "mix", "--gate", "0.1", "--resume") / "mix" / "eval.json"
    ).exists()


@pytest.mark.parametrize(
    "answered, method, warned", [(0.51, "sap", True), (0.5, "sap", False), (1.0, "mix", False)]
)
def test_who_starts_from_a_model_without_safety_is_told(answered, method, warned, capsys):
    train_script.warn_of_start(
        Namespace(method=[method]), [{"metric": "harmful_score", "value": answered}]
    )
    assert (
        f"the start answers {100 * answered:.0f} % of the unsafe prompts: it has little safety to keep"
        in capsys.readouterr().out
    ) == warned


def test_who_trains_a_model_without_safety_by_sap_is_told(start, tmp_path, monkeypatch, capsys):
    evaluate = train_script.evaluate
    monkeypatch.setattr(
        train_script,
        "evaluate",
        lambda *args: [
            r | {"value": 1.0} if r["metric"] == "harmful_score" else r for r in evaluate(*args)
        ],
    )
    train(start, tmp_path / "run", "--method", "sap")
    assert "the start answers 100 % of the unsafe prompts" in capsys.readouterr().out


def test_what_measuring_takes_on_the_way_is_not_the_method_s_peak(start, tmp_path, monkeypatch):
    """Every measurement between two steps is followed by a fresh count."""
    seen, evaluate, step = [], train_script.evaluate, train_script.METHODS["sft"]
    monkeypatch.setattr(
        train_script, "evaluate", lambda *args: seen.append("measured") or evaluate(*args)
    )
    monkeypatch.setattr(train_script, "reset_peak", lambda args: seen.append("reset"))
    monkeypatch.setitem(
        train_script.METHODS, "sft", lambda *args: seen.append("step") or step(*args)
    )
    train(start, tmp_path / "run", "--method", "sft", "--eval_every", "2")
    assert seen == [
        "measured",
        "reset",
        "step",
        "step",
        "measured",
        "reset",
        "step",
        "step",
        "measured",
    ]


def test_a_start_that_was_measured_is_not_loaded_again(start, tmp_path, monkeypatch):
    train(start, tmp_path / "run", "--method", "sft")
    monkeypatch.setattr(
        train_script,
        "load_model",
        lambda path, dtype=None, device="cpu": (
            loaded.append(device) or load_model(path, dtype or torch.float32, device)
        ),
    )
    loaded = []
    train(start, tmp_path / "run", "--method", "sft", "--resume")
    assert loaded == ["meta"]


def test_looking_at_an_average_on_the_way_changes_nothing(start, tmp_path):
    runs = [
        train(
            start,
            tmp_path / every,
            "--method",
            "ema",
            "--strength",
            "ema=0.5",
            "--eval_every",
            every,
        )
        for every in ("0", "1")
    ]
    assert len({(run / "ema" / "model.safetensors").read_bytes() for run in runs}) == 1
    plain = train(start, tmp_path / "plain", "--method", "sft")
    assert (plain / "sft" / "model.safetensors").read_bytes() != (
        runs[0] / "ema" / "model.safetensors"
    ).read_bytes()


def test_resume_skips_what_is_finished_adds_methods_and_refuses_other_arguments(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sft")
    before = (out / "sft" / "model.safetensors").stat().st_mtime_ns
    assert not (out / "pairs.json").exists()  # SFT uses no pairs: no refusals were generated
    train(start, out, "--method", "sft", "project", "--resume")
    assert len(read_json(out / "pairs.json")) == 4
    assert (out / "sft" / "model.safetensors").stat().st_mtime_ns == before and (
        out / "project" / "eval.json"
    ).exists()
    with pytest.raises(
        ValueError,
        match="train_args.json has learning_rate = 0.0005, this command learning_rate = 0.1",
    ):
        train(start, out, "--method", "sft", "--resume", "--learning_rate", "0.1")


def test_resume_notices_rows_that_changed(start, tmp_path):
    rows = [json.dumps({"prompt": f"q{i}", "response": "a"}) for i in range(20)]
    more = ["--method", "sft", "--task", write(tmp_path / "task.jsonl", "\n".join(rows))]
    out = train(start, tmp_path / "run", *more)
    write(tmp_path / "task.jsonl", "\n".join(rows[1:]))
    with pytest.raises(ValueError, match="train_args.json has rows_sha256 = "):
        train(start, out, *more, "--resume")
    (out / "train_args.json").write_text("{}")
    with pytest.raises(ValueError, match="train_args.json: task is missing"):
        train(start, out, *more, "--resume")


def test_resume_notices_another_start_and_other_safe_prompts(start, tmp_path):
    benign = write(tmp_path / "benign.csv", "prompt\na\nb\nc\n")
    out = train(start, tmp_path / "run", "--method", "sft", "--benign", benign)
    write(tmp_path / "benign.csv", "prompt\na\nb\nd\n")
    with pytest.raises(ValueError, match="train_args.json has rows_sha256 = "):
        train(start, out, "--method", "project", "--benign", benign, "--resume")
    write(tmp_path / "benign.csv", "prompt\na\nb\nc\n")
    write_checkpoint(start, BASE | {"vocab_size": VOCAB_SIZE}, seed=1)
    with pytest.raises(ValueError, match="train_args.json has model_crc32 = "):
        train(start, out, "--method", "project", "--benign", benign, "--resume")


def test_eval_notices_that_the_rows_of_the_run_have_changed(start, tmp_path):
    rows = [json.dumps({"prompt": f"q{i}", "response": "a"}) for i in range(30)]
    task = write(tmp_path / "task.jsonl", "\n".join(rows))
    out = train(start, tmp_path / "run", "--method", "sft", "--task", task)
    eval_script.main([str(out / "sft")])
    write(tmp_path / "task.jsonl", "\n".join(rows[:20]))
    with pytest.raises(
        ValueError, match="train_args.json: the rows of this run have changed since"
    ):
        eval_script.main([str(out / "sft")])
    eval_script.main([str(out / "sft"), "--task", task])  # on these rows by intention


def test_an_interruption_at_the_end_repeats_no_step(start, tmp_path, monkeypatch):
    def fails(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_script, "finish", fails)
    with pytest.raises(KeyboardInterrupt):
        train(start, tmp_path / "run", "--method", "sft", "--save_every", "100")
    state = torch.load(tmp_path / "run" / "sft" / "state" / "state.pt", weights_only=True)
    assert state["state"]["step"] == 4


@pytest.mark.parametrize(
    "flags, rates",
    [
        ([], [1, 1, 1, 1]),
        (["--warmup", "2"], [0.5, 1, 1, 1]),
        (["--schedule", "cosine"], [1, 0.853553, 0.5, 0.146447]),
        (["--warmup", "2", "--schedule", "cosine"], [0.5, 1, 1, 0.5]),
    ],
)
def test_the_learning_rate_s_schedule(flags, rates):
    args = train_script.parse_args(["--model", "x", "--learning_rate", "1", "--steps", "4", *flags])
    assert [train_script.learning_rate_at(step, args) for step in range(4)] == pytest.approx(
        rates, abs=1e-6
    )


@pytest.mark.parametrize("clip, factor", [(1.0, 0.2), (0.0, 1.0), (9.0, 1.0)])
def test_an_update_clips_the_gradient_s_norm(clip, factor):
    """Plain gradient descent on a gradient of norm 5, so that the step shows what was left of it."""
    w, gradient = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 4.0])
    norm = train_script.update(torch.optim.SGD([w], lr=1.0), [w], [gradient.clone()], clip, 0.1)
    assert norm == 5
    torch.testing.assert_close(w.detach(), -0.1 * factor * gradient)


def test_alignment_is_not_poisoned_unless_asked():
    def poison(*argv):
        args = train_script.parse_args(["--model", "x", *argv])
        check_args(args, train_script.parse_args(["--model", args.model]))
        return args.poison

    assert [poison("--method", m) for m in ("sap", "ssft", "dpo", "unlearn", "pretrain")] == [
        0.1,
        0,
        0,
        0,
        0,
    ]
    assert (
        poison("--method", "ssft", "--poison", "0.2") == 0.2
        and poison("--task", "FILE", "--method", "sft") == 0
    )


@pytest.mark.parametrize("script", [train_script, probe_script])
def test_help_tells_the_defaults_that_hold(script, monkeypatch):
    parsers = []
    monkeypatch.setattr(
        script.Parser, "parse_args", lambda self, argv: parsers.append(self) or Namespace()
    )
    script.parse_args(["--model", "x"])
    told = {
        action.dest: re.search(r"\(default: ([^ )]+)", action.help or "")
        for action in parsers[0]._actions
    }
    for name, match in told.items():
        default = parsers[0].get_default(name)
        if (
            isinstance(default, (int, float, str))
            and not isinstance(default, bool)
            and name not in ("device", "help")
        ):
            assert match and type(default)(match[1].rstrip(",;")) == default, name


def test_a_state_that_is_damaged_is_named(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sft")
    assert not (out / "sft" / "state").exists()  # nothing is left to resume
    (out / "sft" / "eval.json").unlink()
    (out / "sft" / "state").mkdir()
    (out / "sft" / "state" / "state.pt").write_bytes(b"PK junk")
    with pytest.raises(ValueError, match="state.pt: not a state that can be resumed"):
        train(start, out, "--method", "sft", "--resume")


def test_eval_measures_on_no_row_that_the_run_has_learnt(start, tmp_path):
    """However its file is named; on fewer of those held out, or on others, it does."""
    one, other = (
        write(
            tmp_path / f"{name}.jsonl",
            "".join(
                json.dumps({"prompt": f"{name}{i}", "response": "a"}) + "\n" for i in range(20)
            ),
        )
        for name in ("one", "other")
    )
    out = train(start, tmp_path / "run", "--method", "sft", "--task", one)
    for more in (
        ["--n_eval", "7"],
        ["--n_eval", "7", "--task", str(tmp_path / "run" / ".." / "one.jsonl")],
        ["--task", f"{one}[:20]", "--n_eval", "12"],
    ):
        with pytest.raises(
            ValueError,
            match=r"[0-9]+ of the (7|12) rows to measure on are among those that the run of .*train_args.json may have learnt; it held out 6",
        ):
            eval_script.main([str(out / "sft"), *more])
    eval_script.main([str(out / "sft"), "--n_eval", "5"])
    eval_script.main([str(out / "sft"), "--n_eval", "9", "--task", other])
    write(
        tmp_path / "one.jsonl",
        open(one).read() + json.dumps({"prompt": "new", "response": "a"}) + "\n",
    )
    with pytest.raises(ValueError, match="the rows of this run have changed since"):
        eval_script.main([str(out / "sft"), "--n_eval", "5"])


def test_held_out_rows_that_are_trained_on_are_counted(start, tmp_path, capsys):
    file = write(
        tmp_path / "task.jsonl",
        "".join(json.dumps({"prompt": f"q{i}", "response": "a"}) + "\n" for i in range(8)),
    )
    train(start, tmp_path / "once", "--method", "sft", "--task", file)
    assert "held-out" not in capsys.readouterr().out
    train(start, tmp_path / "four", "--method", "sft", "--task", *[file] * 4)
    assert re.search(
        r"[3-6] of the 6 held-out rows of the task are, word for word, among those to train on",
        capsys.readouterr().out,
    )


def test_eval_measures_what_train_recorded(start, tmp_path, capsys):
    out = train(start, tmp_path / "run", "--method", "sft")
    eval_script.main([str(out / "sft"), "--out", str(tmp_path / "eval.json")])
    recorded = {r["metric"]: r["value"] for r in read_json(out / "sft" / "eval.json")}
    for r in read_json(tmp_path / "eval.json"):
        assert r["value"] == pytest.approx(recorded[r["metric"]], abs=1e-6)
    assert str(out / "sft") in capsys.readouterr().out


def test_a_base_checkpoint_is_measured_on_the_rows_of_the_run_beside_it(start, tmp_path):
    out = train(
        start, tmp_path / "run", "--method", "sft", "--chat_format", "vicuna", "--dtype", "float64"
    )
    eval_script.main([str(start), str(out / "sft"), "--out", str(tmp_path / "eval.json")])
    recorded = {r["metric"]: r["value"] for r in read_json(out / "start.json")}
    found = {
        r["metric"]: (r["value"], r["n"])
        for r in read_json(tmp_path / "eval.json")
        if r["model"] == str(start)
    }
    assert found["task_loss"] == (pytest.approx(recorded["task_loss"], abs=1e-12), 6)


def test_checkpoints_of_two_worlds_are_not_measured_on_the_rows_of_one(start, tmp_path):
    worlds = [write_random_checkpoint(tmp_path / str(seed), World(seed)) for seed in (0, 1)]
    for paths in (worlds, [worlds[0], start]):
        with pytest.raises(ValueError, match="not of one world"):
            eval_script.main([*map(str, paths), "--n_eval", "4"])


def test_a_full_disk_is_an_error_of_the_system(tmp_path, monkeypatch):
    """Of the disk, as a file says it, and not of torch.save."""

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", lambda *args: Full())
    with pytest.raises(OSError, match="No space left"):
        resume.save_whole({"W": [torch.ones(9)]}, tmp_path / "state.pt")


def test_what_is_trained_keeps_the_template(start, tmp_path):
    (start / "chat_template.jinja").write_text(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
    )
    out = train(start, tmp_path / "run", "--method", "sft")
    messages = [{"role": "user", "content": "Hi"}]
    assert Tokenizer(out / "sft").render(messages) == Tokenizer(start).render(messages)
    assert "You are a helpful assistant." in Tokenizer(start).render(messages)


@pytest.mark.parametrize(
    "gradient, loss, told",
    [(float("nan"), 0.0, "the gradient's norm is nan"), (1.0, float("inf"), "loss is inf")],
)
def test_a_number_that_is_not_finite_stops_the_run_and_what_was_saved_stays(
    gradient, loss, told, start, tmp_path, monkeypatch, capsys
):
    whole = train(start, tmp_path / "whole", "--method", "sft")
    sft = train_script.METHODS["sft"]
    spoilt = lambda model, W, *_: ([w * gradient for w in W], {"loss": loss})
    monkeypatch.setitem(
        train_script.METHODS,
        "sft",
        lambda model, W, batch, contrast, args, state: (spoilt if state["step"] == 3 else sft)(
            model, W, batch, contrast, args, state
        ),
    )
    with pytest.raises(SystemExit) as stop:
        run(lambda: train(start, tmp_path / "run", "--method", "sft"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert (
        stop.value.code == 3
        and f"error: sft, step 3: {told}; its rows: demo:" in line
        and "; its pairs: demo:" in line
    )
    monkeypatch.setitem(train_script.METHODS, "sft", sft)
    resumed = train(start, tmp_path / "run", "--method", "sft", "--resume")
    for name in ("model.safetensors", "log.jsonl"):
        assert (whole / "sft" / name).read_bytes() == (resumed / "sft" / name).read_bytes()


def test_curves_average_over_seeds(start, tmp_path, capsys):
    runs = [
        train(
            start,
            tmp_path / f"run{seed}",
            "--method",
            "sft",
            "--seed",
            str(seed),
            "--eval_every",
            "2",
        )
        for seed in (0, 1)
    ]
    capsys.readouterr()
    eval_script.main([*map(str, runs), "--curves"])
    losses = [
        next(
            r["value"]
            for r in read_json(run / "sft" / "eval.json")
            if r["metric"] == "task_loss" and r["step"] == 4
        )
        for run in runs
    ]
    printed = capsys.readouterr().out
    assert (
        f" ({losses[0]:.3f}, {losses[1]:.3f})" in printed
        and f"  {sum(losses) / 2:.3f} [" in printed
    )
    assert "n = 6 unsafe prompts, 6 safe ones, 6 task rows" in printed
    with pytest.raises(
        ValueError, match="seed 0 of sft stands in .*, too; give runs of different seeds"
    ):
        eval_script.main([str(runs[0]), str(runs[0]), "--curves"])
    other = train(
        start, tmp_path / "other", "--method", "sft", "--seed", "2", "--learning_rate", "0.1"
    )
    with pytest.raises(
        ValueError, match="learning_rate = 0.1, but 0.0005 in .*run0; curves are over seeds alone"
    ):
        eval_script.main([*map(str, runs), str(other), "--curves"])
    probed = [
        train(start, tmp_path / f"paper{radius}", "--method", "paper", "--radius", radius)
        for radius in ("0.1", "0.2")
    ]
    eval_script.main(
        [*map(str, runs), str(probed[0]), "--curves"]
    )  # another method may have settings of its own
    with pytest.raises(ValueError, match="paper0.2: radius = 0.2, but 0.1 in .*paper0.1"):
        eval_script.main([*map(str, probed), "--curves"])


def test_without_matplotlib_a_plot_is_refused_before_any_work(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script, *more in ((eval_script, "--curves"), (probe_script,)):
        with pytest.raises(ValueError, match="--plot needs matplotlib: pip install matplotlib"):
            script.main(["nowhere", "--plot", str(tmp_path / "a.png"), *more])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--out", "nowhere/a.json"],
            "--out nowhere/a.json: is a folder, or lies in none that can be written",
        ),
        (["--plot", "a.xyz"], "--plot a.xyz: the picture is a .png"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(arguments, message):
    for script, *more in ((eval_script, "--curves"), (probe_script,)):
        with pytest.raises(ValueError, match=message):
            script.main(["no model", *arguments, *more])


def test_probe_reports_every_layer(start, tmp_path, capsys):
    probe_script.main(
        [
            str(start),
            "--n_eval",
            "12",
            "--batches",
            "1",
            "--batch_size",
            "2",
            "--out",
            str(tmp_path / "probe.json"),
        ]
    )
    rows = read_json(tmp_path / "probe.json")
    assert [row["layer"] for row in rows] == [0, 1] and all(
        0 <= row["auroc"] <= 1 and row["gap_norm"] > 0 and -1 <= row["task_cosine"] <= 1
        for row in rows
    )
    assert "--layers" in capsys.readouterr().out


def test_task_cosine_is_negative_where_the_task_is_harm(start, tmp_path):
    """The harmful answers of the pairs themselves as the task, so that the two gradients are known to be opposed."""
    rows = [
        {"prompt": f"q{i}", "response": "Sure.", "safe": "I can't.", "harmful": "Sure."}
        for i in range(60)
    ]
    file = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    probe_script.main(
        [
            str(start),
            "--task",
            file,
            "--safety",
            file,
            "--n_eval",
            "8",
            "--batches",
            "1",
            "--safe_answers",
            "file",
            "--out",
            str(tmp_path / "probe.json"),
        ]
    )
    assert all(row["task_cosine"] < -0.2 for row in read_json(tmp_path / "probe.json"))


def test_linear_probes_are_scored_on_prompts_that_they_have_not_seen(monkeypatch):
    """Of random states any 40 can be told apart in 64 dimensions; others cannot."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        layers,
        "last_token_states",
        lambda model, tokenizer, prompts: torch.randn(1, 40, 64, generator=generator),
    )
    (found,) = layers.linear_probes(None, None, ["u"] * 40, ["s"] * 40)
    assert found["n"] == 40 and found["accuracy"] < 0.8


def test_precision_finds_the_exact_direction_in_every_dtype(start, tmp_path, capsys):
    probe_script.main(
        [
            str(start),
            "--precision",
            "--n_eval",
            "4",
            "--batch_size",
            "2",
            "--out",
            str(tmp_path / "precision.json"),
        ]
    )
    rows = read_json(tmp_path / "precision.json")
    lowest = {row["dtype"]: row["lowest_cosine"] for row in rows if row["direction"] == "exact"}
    assert len(rows) == len(capsys.readouterr().out.splitlines()) == 15
    assert (
        lowest["float64"] == pytest.approx(1)
        and lowest["float32"] > 0.9999
        and lowest["bfloat16"] > 0.95
    )
    turned = {row["dtype"]: (row["cosine"], row["size"]) for row in rows if "size" in row}
    assert turned["float64"] == pytest.approx((1, 1)) and turned["float32"] == pytest.approx(
        (1, 1), abs=1e-2
    )
    with pytest.raises(ValueError, match="--radius 0: there would be no probe to look at"):
        probe_script.main([str(start), "--precision", "--radius", "0"])


def test_precision_draws_nothing_and_says_so(start, tmp_path):
    for flags in (["--plot", str(tmp_path / "p.png")], ["--batches", "9"]):
        with pytest.raises(ValueError, match=f"{flags[0]} has no part in --precision"):
            probe_script.main([str(start), "--precision", *flags])


def test_a_linear_probe_finds_a_planted_direction_and_nothing_in_noise():
    random = torch.Generator().manual_seed(0)
    noise, y = torch.randn(400, 16, generator=random), torch.arange(400) % 2.0
    planted = noise + 3 * y[:, None] * torch.eye(16)[0]
    for x, low, high in ((planted, 0.9, 1.0), (noise, 0.35, 0.65)):
        assert (
            low <= layers.linear_probe(x[:200], y[:200], x[200:], y[200:].float())["auroc"] <= high
        )


def test_recommended_layers_are_the_third_with_the_largest_effect():
    assert layers.recommend([0, 1, 5, 4, 1, 6]) == "2-3"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("10-12", [10, 11, 12]),
        ("3,9", [3, 9]),
        ("9,3-4,4", [3, 4, 9]),
        (None, [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
    ],
)
def test_layers(text, expected):
    assert parse_layers(text, 30) == expected


def write(path, text):
    path.write_text(text)
    return str(path)


def held_out(n):
    """Seven rows, of which the one that is held out whatever the others are trained on has a prompt of n bytes."""
    last = int(np.random.default_rng(0).permutation(7)[-1])
    return "".join(
        json.dumps({"prompt": "q" * (n if i == last else 1), "response": "a"}) + "\n"
        for i in range(7)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            lambda p: ["--model", "nowhere"],
            "error: --model nowhere: no checkpoint there or under weights/",
        ),
        (
            lambda p: ["--poison", "much"],
            "error: argument --poison: invalid float value: 'much'; see --help",
        ),
        (
            lambda p: ["--method", "paper", "--layers", "1-5"],
            "error: --layers 1-5: the model has layers 0 to 1",
        ),
        (
            lambda p: ["--method", "paper", "--layers", "0-999999999999"],
            "error: --layers 0-999999999999: the model has layers 0 to 1",
        ),
        (
            lambda p: ["--method", "paper", "--layers", "1-0"],
            "error: --layers 1-0: the model has layers 0 to 1",
        ),
        (
            lambda p: ["--learning_rate", "inf"],
            "error: --learning_rate inf: at least 0, and finite",
        ),
        (lambda p: ["--device", "meta"], "error: --device meta: "),
        (
            lambda p: ["--method", "paper", "--layers", "0-1-1"],
            "error: --layers 0-1-1: expected something like 10-19 or 3,9",
        ),
        (
            lambda p: ["--method", "sft", "--task", write(p / "a.jsonl", '{"prompt": "q"}\n')],
            "a.jsonl:1: response is missing",
        ),
        (
            lambda p: ["--method", "sft", "--task", str(p / "none.jsonl")],
            "none.jsonl: No such file",
        ),
        (
            lambda p: ["--method", "sft", "sap", "--task", "a.jsonl"],
            "error: sap needs safety rows beside --task: give --safety FILE",
        ),
        (
            lambda p: ["--method", "sft", "--task", "a.jsonl", "--poison", "0.1"],
            "error: --poison needs safety rows beside --task",
        ),
        (
            lambda p: ["--method", "sft", "--task", write(p / "a.jsonl", held_out(999))],
            "leave nothing of the response within max_len = 256",
        ),
        (
            lambda p: ["--gate", "0.3", "--method", "paper"],
            "error: --gate: --method paper does not read it; sap would",
        ),
        (
            lambda p: ["--layers", "1"],
            "error: --layers: --method sap does not read it; paper, paper_project, random_probe, steer, steer_project would",
        ),
        (
            lambda p: ["--strength", "kl=2"],
            "error: --strength kl=2: --method sap does not read it; kl would",
        ),
        (lambda p: ["--radius", "nan"], "error: --radius nan: at least 0"),
        (lambda p: ["--device", "cuda:99"], "error: --device cuda:99: "),
        (
            lambda p: ["--lora_rank", "0", "--dtype", "bfloat16"],
            "error: --lora_rank 0 with --dtype bfloat16: most steps would be lost",
        ),
        (
            lambda p: ["--safety", write(p / "a.csv", "goal,target\na,b\n")],
            "a.csv: 1 rows are too few to set 4 (--pairs) + 6 (--n_eval) of them apart",
        ),
        (lambda p: ["--max_len", "40"], "leave nothing of the response within max_len = 40"),
        (lambda p: ["--poison", "0.9"], "needs 715 harmful rows; there are 278"),
        (lambda p: ["--poison", "1.5"], "error: --poison 1.5: a share from 0 to 1"),
        (lambda p: ["--lora_targets", "c_attn"], "lora targets ['c_attn']"),
        (
            lambda p: ["--strength", "sap=1"],
            "error: --strength sap=1: expected METHOD=VALUE, a number from 0 up (ema: to 1) for one of mix, ",
        ),
        (
            lambda p: ["--strength", "ema=5"],
            "error: --strength ema=5: expected METHOD=VALUE, a number from 0 up (ema: to 1)",
        ),
        (lambda p: ["--strength", "kl=-1"], "error: --strength kl=-1: expected METHOD=VALUE"),
        (
            lambda p: ["--method", "safelora"],
            "error: safelora projects onto what safety training wrote: give --before",
        ),
        (
            lambda p: ["--before", "tiny"],
            "error: --before: is what --watch mechanism and safelora compare with",
        ),
        (
            lambda p: ["--lora_rank", "0", "--lora_targets", "nonsense"],
            "error: --lora_targets: has no part without --lora_rank",
        ),
        (
            lambda p: ["--lora_rank", "0", "--lora_alpha", "99"],
            "error: --lora_alpha: has no part without --lora_rank",
        ),
        (lambda p: ["--watch_every", "3"], "error: --watch_every: has no part without --watch"),
    ],
)
def test_bad_input_is_one_line_status_2_and_nothing_written(
    arguments, message, start, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        run(lambda: train(start, tmp_path / "run", *arguments(tmp_path)))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and message in printed and len(printed.strip().splitlines()) == 1, (
        printed
    )
    assert not (tmp_path / "run").exists()


def test_a_chat_format_world_without_a_world_is_refused(start, tmp_path):
    with pytest.raises(
        ValueError,
        match="tokenizer_config.json: world_seed = None; a checkpoint of the synthetic world",
    ):
        train(start, tmp_path / "run", "--chat_format", "world")


@pytest.mark.parametrize("chat_format, status", [("vicuna", 0), ("alpaca", 2)])
def test_the_command_itself_ends_with_its_status(chat_format, status, start, tmp_path):
    command = [
        sys.executable,
        "train.py",
        "--model",
        str(start),
        "--out_dir",
        str(tmp_path / "run"),
        *FAST,
        "--chat_format",
        chat_format,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and (tmp_path / "run" / "sap" / "eval.json").exists() == (
        status == 0
    ), done.stderr


@pytest.mark.parametrize(
    "of, told",
    [
        (
            "safety_loss",
            r"error: sap, before the first step: safety_loss of \S+pairs.json: row 1, \S+ row 2 is nan",
        ),
        ("row_slopes", r"error: sap, before the first step: the slope of demo:\w+:\d+ is nan"),
    ],
)
def test_a_number_that_is_not_finite_leaves_out_no_row_in_silence(
    of, told, start, tmp_path, monkeypatch, capsys
):
    real = getattr(sap, of)
    monkeypatch.setattr(sap, of, lambda *args: real(*args) * float("nan"))
    with pytest.raises(SystemExit) as stop:
        run(lambda: train(start, tmp_path / "run", "--method", "sap"))
    assert stop.value.code == 3 and re.search(told, capsys.readouterr().err)


def test_who_comes_second_to_an_empty_directory_finds_it_taken(start, tmp_path, monkeypatch):
    """Between the look into the directory and its lock another run began and came to its end."""
    real, came = resume.lock_folder, []

    def late(folder):
        if not came:
            came.append(folder)
            train(start, folder, "--method", "sft")
        return real(folder)

    monkeypatch.setattr(resume, "lock_folder", late)
    with pytest.raises(ValueError, match="already holds a run"):
        train(start, tmp_path / "run", "--method", "sft", "--seed", "1")
    assert read_json(tmp_path / "run" / "train_args.json")["seed"] == 0


def test_a_directory_that_holds_a_run_is_left_alone(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sft")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(
        ValueError, match="already holds a run; choose another, or go on with it by --resume"
    ):
        train(start, out, "--method", "sft")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


HOLD = (
    "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from minisap.run.resume import lock_folder; "
    "held = lock_folder(Path(sys.argv[2])); print('held', flush=True); time.sleep(60)"
)


def test_two_runs_cannot_share_a_directory_and_a_dead_one_holds_none(start, tmp_path):
    out = train(start, tmp_path / "run", "--method", "sft")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(ROOT), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"run: a run is at work there, by process {other.pid}"):
        train(start, out, "--method", "sap", "--resume")
    other.kill()
    other.wait()
    assert (train(start, out, "--method", "sap", "--resume") / "sap" / "eval.json").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    start = write_tokenizer(write_checkpoint(tmp_path / "start", BASE))
    with pytest.raises(
        ValueError, match=f"the tokenizer has {VOCAB_SIZE} tokens, the embedding 96"
    ):
        train(start, tmp_path / "run")
