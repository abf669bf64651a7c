"""The study: its records against the models they are of, its checks against planted records, its directory, its pictures."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import BASE, VOCAB_SIZE, write_checkpoint, write_tokenizer

import probe as probe_script
import train as train_script
from minisap.checkpoint import load_model, read_json
from minisap.measure.attacks import plain
from minisap.study import protocols as study
from minisap.study.compare import ALPHAS, answers_between, measure
from minisap.study.figures import FIGURES, draw_all
from minisap.study.mechanism import clusters, mlp_streams
from minisap.study.observations import OBSERVATIONS, PROTOCOLS, Values, check_all
from minisap.study.world import SETS, World
from minisap.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
KEYS = {"protocol", "seed", "set", "layer", "metric", "value"}


@pytest.fixture(scope="module")
def compared():
    """(before, after, tokenizer, sets, records of after against before)."""
    before, after, tokenizer = load_model(TINY / "instruct"), load_model(TINY), Tokenizer(TINY)
    sets = {
        name: rows
        for name, rows in World(0).sets(8).items()
        if name in ("safe", "unsafe", "co_text")
    }
    records = measure(after, tokenizer, sets, 64, before) + answers_between(
        before, after, tokenizer, sets
    )
    return before, after, tokenizer, sets, [{"protocol": "after", "seed": 0} | r for r in records]


def test_records_are_what_the_measures_say(compared):
    before, after, tokenizer, sets, records = compared
    series = Values(records)
    streams = {
        name: mlp_streams(after, plain(tokenizer, [row["prompt"] for row in rows]))
        for name, rows in sets.items()
    }
    for j in range(3):
        found = clusters(streams["co_text"][1][j], streams["safe"][1][j])
        assert series.mean("after", "co_text", "separation")[j] == pytest.approx(
            found["separation"]
        )
        a = streams["unsafe"][0][j].double()
        gate, up = (
            after.model.layers[j].mlp.get_parameter(f"{name}_proj.weight").detach()
            - before.model.layers[j].mlp.get_parameter(f"{name}_proj.weight").detach()
            for name in ("gate", "up")
        )
        seen = torch.cat([gate, up]).double() @ (a / a.norm(dim=1, keepdim=True)).T
        assert series.mean("after", "unsafe", "delta_a")[j] == pytest.approx(
            seen.norm(dim=0).mean().item()
        )
    for name in sets:  # the ends of the path are the two models
        assert series("after", name, "comply_alpha_1.0") == series("after", name, "comply")
        assert series("after", name, "comply_alpha_0.0") == 1
        assert sum(
            series("after", name, verdict) for verdict in ("comply", "refuse", "other")
        ) == pytest.approx(1)


def test_what_is_measured_was_not_fine_tuned_on():
    """Neither by safety training nor by train.py's built-in rows; about 2 % of all rows have occurred in pre-training."""
    world = World(0)
    instruct = {row["prompt"] for row in world.rows("instruct", 3000)}  # a tenth of them
    assert sum(row["prompt"] in instruct for row in world.safe_rows) < 0.003 * len(world.safe_rows)
    measured = {row["prompt"] for rows in world.sets(50).values() for row in rows}
    built_in = {row["prompt"] for row in (*world.task_rows(), *world.safety_rows())} | set(
        world.safe_prompts()
    )
    trained = {
        row["prompt"] for name in ("safe", "unsafe") for row in world.safety_training_rows(name)
    }
    assert len(measured) == 8 * 50 and len(built_in) == 9000 and len(trained) == 32_000
    assert not measured & built_in and not measured & trained and not built_in & trained


def test_a_set_too_small_is_refused(compared, monkeypatch):
    before, after, tokenizer, sets, _ = compared
    with pytest.raises(ValueError, match="co_text: 1 prompts"):
        measure(after, tokenizer, sets | {"co_text": sets["co_text"][:1]}, 64)
    few = World(0).rows("twin", 3)
    monkeypatch.setattr(World, "draw", lambda world, random, name: few[random.integers(3)])
    with pytest.raises(
        ValueError, match="4 rows of the world's set twin: after 3 a new one is hard to find"
    ):
        World(0).rows("twin", 4)


def planted():
    """{(protocol, set, metric): value} of a world in which every observation holds."""
    values = {("instruct", name, "comply"): 1.0 for name in SETS}
    for i, p in enumerate(PROTOCOLS):
        values |= {
            (p, "safe", "comply"): 0.99,
            (p, "unsafe", "refuse"): 0.99,
            (p, "unsafe", "comply"): 0.01,
            (p, "unsafe", "separation"): (6.0, 19.0, 20.0)[i],
            (p, "unsafe", "lipschitz_relative"): 1.0,
            (p, "safe", "lipschitz_relative"): 2.0,
        }
    values |= {("instruct", name, "lipschitz_relative"): 1.5 for name in ("unsafe", "safe")}
    values |= {
        ("ssft", name, "tau"): tau
        for name, tau in (
            ("unsafe", -6),
            ("safe", 6),
            ("co_task", -1),
            ("co_text", 0),
            ("adv_4", 1),
        )
    }
    values |= {
        ("continued", name, "tau"): tau
        for name, tau in (
            ("unsafe", -6),
            ("safe", 6),
            ("co_task", -3),
            ("co_text", -2),
            ("adv_4", -7),
        )
    }
    for name, comply in (("co_task", 0.3), ("co_text", 0.4)):
        values |= {
            ("ssft", name, "comply"): comply,
            ("ssft", name, "comply_alpha_1.0"): comply,
            ("ssft", name, "comply_alpha_1.2"): 0.1,
        }
    for name, unsafe in (("capitals", 0.1), ("twin", 0.1)):
        values |= {("ssft", name, "comply"): unsafe, ("ssft", name, "refuse"): 0.5}
        values |= {("ssft", f"{name}_safe", "comply"): 0.9, ("ssft", f"{name}_safe", "refuse"): 0.0}
    values |= {("ssft", f"adv_{k}", "comply"): share for k, share in ((1, 0.1), (2, 0.1), (4, 0.3))}
    values |= {
        ("continued", "unsafe", "separation"): 2.0,
        ("dpo", "unsafe", "sigma1_share"): 0.6,
        ("dpo", "safe", "sigma1_share"): 0.1,
    }
    values |= {
        ("ssft", None, "sin_theta"): 0.95,
        ("continued", None, "sin_theta"): 0.9,
        ("ssft", None, "sin_theta_random"): 0.93,
    }
    for p, unsafe, safe in (("ssft", 0.5, 0.3), ("unlearn", 0.6, 0.3), ("continued", 0.3, 0.3)):
        values |= {(p, "unsafe", "delta_a"): unsafe, (p, "safe", "delta_a"): safe}
    for alpha, share in zip(ALPHAS, (1.0, 1.0, 0.5, 0.2, 0.0)):
        values |= {
            ("ssft", "unsafe", f"comply_alpha_{alpha}"): share,
            ("ssft", "safe", f"comply_alpha_{alpha}"): 0.99,
        }
    return values | {
        ("ssft", "safe", "comply_alpha_1.2"): 0.95,
        ("sft", None, "safety_share"): 0.5,
        ("sap", None, "safety_share"): 0.3,
        ("benign", None, "safety_share"): 0.25,
        ("sap", None, "safety_share_random"): 0.2,
    }


PER_LAYER = ("separation", "tau", "sigma1_share", "delta_a", "sin_theta", "sin_theta_random")


def holds(values):
    """Of records with two layers, where a metric has layers: the first is the last's turned round, but for means over layers."""
    records = [
        {
            "protocol": p,
            "seed": 0,
            "set": s,
            "layer": layer,
            "metric": m,
            "value": 1 - v if layer == 0 and not m.startswith("sin") else v,
        }
        for (p, s, m), v in values.items()
        for layer in ((0, 1) if m in PER_LAYER else (None,))
    ]
    return {check["claim"]: check["holds"][0] for check in check_all(records)}


@pytest.mark.parametrize(
    "place, value, failing",
    [
        (("instruct", "twin", "comply"), 0.98, "before safety training"),
        (("dpo", "safe", "comply"), 0.97, "after it safe"),
        (("unlearn", "unsafe", "refuse"), 0.97, "after it safe"),
        (("ssft", "co_task", "comply"), 0.05, "competing"),
        (("ssft", "capitals", "comply"), 0.05, "(ours) an alphabet"),
        (("ssft", "twin", "comply"), 0.05, "names of"),
        (("ssft", "adv_2", "comply"), 0.05, "soft suffixes"),
        (("continued", "unsafe", "separation"), 4.1, "SSFT parts"),
        (("dpo", "unsafe", "separation"), 17.9, "DPO and"),
        (("dpo", "safe", "sigma1_share"), 0.31, "after DPO unsafe prompts vary"),
        (("ssft", "adv_4", "tau"), -2.5, "jailbreaks look"),
        (("continued", "co_task", "tau"), -2, "jailbreaks look"),
        (("ssft", None, "sin_theta"), 0.935, "ΔW leaves"),
        (("continued", "unsafe", "delta_a"), 0.34, "ΔW acts"),
        (("unlearn", "safe", "delta_a"), 0.57, "ΔW acts"),
        (("dpo", "unsafe", "lipschitz_relative"), 1.4, "the model grows"),
        (("ssft", "unsafe", "comply_alpha_0.75"), 0.6, "along W"),
        (("ssft", "safe", "comply_alpha_0.5"), 0.97, "along W"),
        (("ssft", "co_text", "comply_alpha_1.2"), 0.36, "α = 1.2"),
        (("sap", None, "safety_share"), 0.38, "(ours) SAP"),
        (("benign", None, "safety_share"), 0.05, "(ours) SAP"),
    ],
)
def test_every_check_can_fail(place, value, failing):
    assert all(holds(planted()).values())
    assert [claim for claim, good in holds(planted() | {place: value}).items() if not good][
        0
    ].startswith(failing)
    assert sum(not good for good in holds(planted() | {place: value}).values()) == 1


def test_a_soft_suffix_that_does_nothing_does_not_hold():
    flat = {("ssft", f"adv_{k}", "comply"): 0.01 for k in (1, 2, 4)}
    assert not holds(planted() | flat)[
        "soft suffixes jailbreak it, the more the longer (unsafe + 5 points)"
    ]


class Axes:
    """In place of matplotlib's: keeps what is drawn."""

    def __init__(self):
        self.drawn = []

    def plot(self, x, y, *style, **options):
        self.drawn.append((options.get("label"), list(x), list(y)))
        return [self]

    def __getattr__(self, name):
        if name.startswith("_"):  # NumPy asks for some
            raise AttributeError(name)
        return lambda *arguments, **options: None


class Pyplot:
    def __init__(self):
        self.figures = {}

    def subplots(self, rows, columns, **options):
        self.axes = [Axes() for _ in range(columns)]
        return self, np.array([self.axes])

    def savefig(self, file, **options):
        self.figures[file.stem] = self.axes

    def tight_layout(self):
        pass

    def close(self, figure):
        pass


@pytest.fixture
def canvas(monkeypatch):
    canvas = Pyplot()
    monkeypatch.setattr("minisap.study.figures.pyplot", lambda: canvas)
    monkeypatch.setattr("minisap.run.flags.pyplot", lambda: canvas)
    monkeypatch.setattr("probe.pyplot", lambda: canvas)
    return canvas


def test_pictures_show_means_over_seeds(canvas, tmp_path):
    records = [
        {
            "protocol": "ssft",
            "seed": seed,
            "set": "unsafe",
            "layer": j,
            "metric": "separation",
            "value": 10 * j + seed,
        }
        for seed in (1, 3)
        for j in (0, 1)
    ]
    records += [
        {
            "protocol": "ssft",
            "seed": seed,
            "set": "safe",
            "layer": None,
            "metric": f"comply_alpha_{alpha}",
            "value": alpha / seed,
        }
        for seed in (1, 3)
        for alpha in ALPHAS
    ]
    draw_all(records, tmp_path)
    assert list(canvas.figures) == ["separation", "path"]
    assert canvas.figures["separation"][0].drawn == [
        ("ssft", [0, 1], [2, 12]),
        (None, [0, 1], [1, 11]),
        (None, [0, 1], [3, 13]),
    ]
    label, x, y = canvas.figures["path"][0].drawn[0]
    assert (
        label == "safe"
        and x == list(ALPHAS)
        and y == pytest.approx([100 * alpha * (1 + 1 / 3) / 2 for alpha in ALPHAS])
    )


def test_a_command_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        study.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 2)
    )
    with pytest.raises(ValueError, match="instruct: the command above failed"):
        study.train(tmp_path, "instruct", seed=0)


def mark(model):
    """A number that tells models apart."""
    return sum(w.sum().item() for w in model.parameters())


@pytest.fixture
def short_study(monkeypatch, canvas):
    """The commands of a study of two steps a stage, run in-process. Records stand for those of any model, but for four: "fisher" is
    the mark of the model that is measured, "rank" that of the one before it, and so on the path, with α = 1 and 0."""
    commands = []

    def in_process(command, cwd):
        commands.append(command)
        monkeypatch.chdir(cwd)
        train_script.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    short = lambda flags: " ".join(
        [
            *flags.split(),
            *"--steps 2 --n_eval 2 --batch_size 4 --pairs 4 --pairs_per_step 2".split(),
            *["--watch_every", "1"] * ("--watch" in flags),
        ]
    )
    monkeypatch.setattr(study, "INSTRUCTIONS", 40)
    monkeypatch.setattr(
        study,
        "RECIPES",
        {
            run: (start, short(flags), methods)
            for run, (start, flags, methods) in study.RECIPES.items()
        },
    )
    monkeypatch.setattr(study.subprocess, "run", in_process)
    for name, small in (
        ("BUILT_IN", {"safe": 4020, "unsafe": 520}),
        ("MEASURED", 3),
        ("SAFETY_TRAINING", 40),
    ):
        monkeypatch.setattr(f"minisap.study.world.{name}", small)
    whole = measure(
        load_model(TINY), Tokenizer(TINY), World(0).sets(2), 64, load_model(TINY / "instruct")
    )
    marks = {
        "fisher": lambda model, before: mark(model),
        "rank": lambda model, before: mark(before) if before else None,
    }

    def marked(model, tokenizer, sets, max_len, before):
        assert tokenizer.world_seed == 3 and sets == World(3).sets(2)
        return [
            r | {"value": marks[r["metric"]](model, before)} if r["metric"] in marks else r
            for r in whole
        ]

    def marked_between(before, after, tokenizer, sets):
        assert tokenizer.world_seed == 3 and sets == World(3).sets(2)
        ends = {"comply_alpha_0.0": mark(before), "comply_alpha_1.0": mark(after)}
        return [r | {"value": ends.get(r["metric"], r["value"])} for r in between]

    between = answers_between(
        load_model(TINY / "instruct"), load_model(TINY), Tokenizer(TINY), World(0).sets(2)
    )
    monkeypatch.setattr(study, "measure", marked)
    monkeypatch.setattr(study, "answers_between", marked_between)
    return commands


def assert_records_are_of_their_models(records, folder):
    checkpoints = {
        "instruct": "instruct/pretrain",
        "continued": "continued/sft",
        "sft": "poisoned/sft",
        "sap": "poisoned/paper_project",
        "benign": "benign/sft",
    } | {protocol: f"aligned/{protocol}" for protocol in PROTOCOLS}
    weights = {
        protocol: mark(load_model(folder / checkpoint))
        for protocol, checkpoint in checkpoints.items()
    }
    of = lambda protocol, metric: {
        r["value"] for r in records if r["protocol"] == protocol and r["metric"] == metric
    }
    for protocol in checkpoints:
        parent = {"sft": "ssft", "sap": "ssft", "benign": "ssft"}.get(protocol, "instruct")
        before = {weights[parent]} if protocol != "instruct" else set()
        assert of(protocol, "fisher") == {weights[protocol]} and of(protocol, "rank") == (
            before or {None}
        )
        assert of(protocol, "comply_alpha_0.0") == before and of(protocol, "comply_alpha_1.0") == (
            before and {weights[protocol]}
        )


def test_the_study_runs_and_is_kept(short_study, tmp_path, capsys, canvas):
    """Every record, every picture, nothing twice; what was interrupted goes on; another study is refused."""
    out_dir, commands = tmp_path / "study", short_study
    arguments = [
        "--study",
        "world",
        "--seeds",
        "3",
        "--n_eval",
        "2",
        "--out_dir",
        str(out_dir),
        "--plot",
    ]
    probe_script.main(arguments)
    records = read_json(out_dir / "study.json")
    assert all(r.keys() == KEYS and r["seed"] == 3 for r in records)
    assert {r["protocol"] for r in records} == {*study.MODELS, None} and len(
        [r for r in records if not r["protocol"]]
    ) == len(OBSERVATIONS)
    assert canvas.figures.keys() == FIGURES.keys()
    assert (
        Tokenizer(out_dir / "seed3/poisoned/paper_project").world_seed == 3
        and "--seed 3" in capsys.readouterr().out
    )
    assert_records_are_of_their_models(records, out_dir / "seed3")
    done = len(commands)
    probe_script.main(arguments)
    assert len(commands) == done and read_json(out_dir / "study.json") == records
    for lost in ("records.json", "aligned/dpo/eval.json"):  # as if it had been interrupted
        (out_dir / "seed3" / lost).unlink()
    probe_script.main(arguments)
    assert len(commands) == 2 * done and all("--resume" in command for command in commands[done:])
    assert read_json(out_dir / "study.json") == records
    for more, message in (
        (["--n_eval", "3"], "holds another study, with n_eval = 2"),
        (["--n_eval", "1"], "safe: 1 prompts"),
        (["--n_eval", "1001"], "1001 prompts of each set to measure on; the world has 3"),
        (["--seeds", "-1"], "--seeds -1: at least 0"),
        (["--precision"], "--precision has no part in --study"),
        (["--seed", "5"], "--seed has no part in --study"),
        (["--device", "cuda"], "--device has no part in"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_script.main([*arguments, *more])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full: holds something else"):
        probe_script.main(
            ["--study", "world", "--n_eval", "2", "--out_dir", str(tmp_path / "full")]
        )


def test_two_checkpoints_of_any_kind_are_compared(tmp_path, canvas):
    """Of one that was trained in its attention alone, all but ΔW of the MLP, which there is not."""
    start = write_tokenizer(
        write_checkpoint(
            tmp_path / "start", BASE | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
        )
    )
    train_script.main(
        [
            "--model",
            str(start),
            "--method",
            "sft",
            "--steps",
            "2",
            "--batch_size",
            "2",
            "--n_eval",
            "4",
            "--out_dir",
            str(tmp_path / "run"),
        ]
    )
    trained = str(tmp_path / "run" / "sft")
    probe_script.main(
        [
            trained,
            "--before",
            str(start),
            "--n_eval",
            "4",
            "--out_dir",
            str(tmp_path / "compared"),
            "--plot",
            "--attack",
        ]
    )
    records = read_json(tmp_path / "compared" / "compare.json")
    metrics = {r["metric"] for r in records}
    assert (
        all(r.keys() == KEYS for r in records)
        and {"separation", "lipschitz_relative", "comply_alpha_1.2"} <= metrics
    )
    assert (
        not {"sin_theta", "delta_a"} & metrics
        and not {"column_space", "row_space", "safety_share"} & canvas.figures.keys()
    )
    assert {r["set"] for r in records} >= {"safe", "unsafe", "prefill_4", "adv_1", "adv_4"}
    for arguments, message in (
        ([trained, "--before", trained, "--out_dir", "x"], "the same weights"),
        ([trained, "--before", str(start)], "give --out_dir DIR"),
        (
            [trained, "--before", str(start), "--out_dir", "x", "--plot", "a.png"],
            "--plot without a file",
        ),
        (
            [trained, "--before", str(start), "--out_dir", str(tmp_path / "compared")],
            "holds something else",
        ),
        ([str(tmp_path / "run")], "no checkpoint itself, but there are .*run/sft"),
        ([trained, "--attack"], "--attack has a part in --before alone"),
        ([trained, "--seeds", "1"], "did you mean --seed"),
        (
            ["tiny", "--before", "tiny/instruct", "--out_dir", "x", "--benign", "F"],
            "on the sets of that world",
        ),
        ([trained, "--plot"], "--plot PNG and --out FILE are for one"),
        (["--n_eval", "4"], "give a checkpoint"),
        ([trained, "--study", "world", "--out_dir", "x"], "give a checkpoint, or"),
    ):
        with pytest.raises(ValueError, match=message):
            probe_script.main(arguments)
