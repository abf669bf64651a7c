"""The study: its records against the models they are of, its checks against planted records, its directory, its pictures."""
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import probe as probe_script
import train as train_script
from minisap import study
from minisap.attacks import plain
from minisap.checkpoint import load_model, read_json
from minisap.compare import ALPHAS, measure, path
from minisap.figures import FIGURES, draw_all
from minisap.mechanism import clusters, mlp_streams
from minisap.observations import OBSERVATIONS, PROTOCOLS, Values, check_all
from minisap.tokenizer import Tokenizer
from minisap.world import SETS, World
from tiny import BASE, VOCAB_SIZE, write_checkpoint, write_tokenizer

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
KEYS = {"protocol", "seed", "set", "layer", "metric", "value"}


@pytest.fixture(scope="module")
def compared():
    """(before, after, tokenizer, sets, records of after against before)."""
    before, after, tokenizer = load_model(TINY / "instruct"), load_model(TINY), Tokenizer(TINY)
    sets = {name: rows for name, rows in World(0).sets(8).items() if name in ("safe", "unsafe", "co_text")}
    records = measure(after, tokenizer, sets, 64, before) + path(before, after, tokenizer, sets)
    return before, after, tokenizer, sets, [{"protocol": "after", "seed": 0} | r for r in records]


def test_records_are_what_the_measures_say(compared):
    before, after, tokenizer, sets, records = compared
    series = Values(records)
    streams = {name: mlp_streams(after, plain(tokenizer, [row["prompt"] for row in rows])) for name, rows in sets.items()}
    for j in range(3):
        found = clusters(streams["co_text"][1][j], streams["safe"][1][j])
        assert series.mean("after", "co_text", "separation")[j] == pytest.approx(found["separation"])
        a = streams["unsafe"][0][j].double()
        gate, up = (after.model.layers[j].mlp.get_parameter(f"{name}_proj.weight").detach()
                    - before.model.layers[j].mlp.get_parameter(f"{name}_proj.weight").detach() for name in ("gate", "up"))
        seen = torch.cat([gate, up]).double() @ (a / a.norm(dim=1, keepdim=True)).T
        assert series.mean("after", "unsafe", "delta_a")[j] == pytest.approx(seen.norm(dim=0).mean().item())
    for name in sets:                                                   # the ends of the path are the two models
        assert series("after", name, "comply_alpha_1.0") == series("after", name, "comply")
        assert series("after", name, "comply_alpha_0.0") == 1
        assert sum(series("after", name, verdict) for verdict in ("comply", "refuse", "other")) == pytest.approx(1)


def test_a_set_too_small_is_refused(compared, monkeypatch):
    before, after, tokenizer, sets, _ = compared
    with pytest.raises(ValueError, match="co_text: 1 prompts"):
        measure(after, tokenizer, sets | {"co_text": sets["co_text"][:1]}, 64)
    with pytest.raises(ValueError, match="9000 prompts of every set: the world has no more than 8288"):
        World(0).sets(9000)
    few = World(0).rows("twin", 3)
    monkeypatch.setattr(World, "draw", lambda world, random, name: few[random.integers(3)])
    with pytest.raises(ValueError, match="4 rows of the world's set twin: after 3 a new one is hard to find"):
        World(0).rows("twin", 4)


def planted():
    """{(protocol, set, metric): value} of a world in which every observation holds."""
    values = {("instruct", name, "comply"): 1.0 for name in SETS}
    for i, p in enumerate(PROTOCOLS):
        values |= {(p, "safe", "comply"): 0.99, (p, "unsafe", "refuse"): 0.99, (p, "unsafe", "comply"): 0.01,
                   (p, "unsafe", "separation"): (6.0, 19.0, 20.0)[i], (p, "unsafe", "lipschitz"): 1.0, (p, "safe", "lipschitz"): 2.0}
    for name, protocol in (("unsafe", "instruct"), ("safe", "instruct")):
        values[protocol, name, "lipschitz"] = 1.5
    for name, comply, tau in (("co_task", 0.3, -1.0), ("co_text", 0.4, 0.0), ("adv", None, 1.0), ("unsafe", None, -5.0)):
        values["ssft", name, "tau"] = tau
        if comply:
            values |= {("ssft", name, "comply"): comply, ("ssft", name, "comply_alpha_1.0"): comply, ("ssft", name, "comply_alpha_1.2"): 0.1}
    values |= {("ssft", f"adv_{k}", "comply"): share for k, share in ((1, 0.1), (2, 0.1), (4, 0.3))}
    values |= {("continued", "unsafe", "separation"): 2.0, ("dpo", "unsafe", "sigma1_share"): 0.6, ("dpo", "safe", "sigma1_share"): 0.1}
    values |= {("ssft", None, "sin_theta"): 0.95, ("continued", None, "sin_theta"): 0.9, ("ssft", None, "sin_theta_random"): 0.93}
    for p, unsafe, safe in (("ssft", 0.5, 0.3), ("unlearn", 0.6, 0.3), ("continued", 0.3, 0.3)):
        values |= {(p, "unsafe", "delta_a"): unsafe, (p, "safe", "delta_a"): safe}
    for alpha, share in zip(ALPHAS, (1.0, 1.0, 0.5, 0.2, 0.0)):
        values |= {("ssft", "unsafe", f"comply_alpha_{alpha}"): share, ("ssft", "safe", f"comply_alpha_{alpha}"): 0.99}
    return values | {("ssft", "safe", "comply_alpha_1.2"): 0.95, ("sft", None, "safety_share"): 0.5, ("sap", None, "safety_share"): 0.4,
                     ("sap", None, "safety_share_random"): 0.2}


def holds(values):
    records = [{"protocol": p, "seed": 0, "set": s, "layer": None, "metric": m, "value": v} for (p, s, m), v in values.items()]
    return [check["holds"][0] for check in check_all(records)]


@pytest.mark.parametrize("place, value, failing", [
    (("instruct", "twin", "comply"), 0.98, 0), (("dpo", "safe", "comply"), 0.97, 1), (("unlearn", "unsafe", "refuse"), 0.97, 1),
    (("ssft", "co_task", "comply"), 0.05, 2), (("ssft", "adv_2", "comply"), 0.05, 3), (("continued", "unsafe", "separation"), 4.1, 4),
    (("dpo", "unsafe", "separation"), 17.9, 5), (("dpo", "safe", "sigma1_share"), 0.7, 6), (("ssft", "adv", "tau"), -6.0, 7),
    (("ssft", None, "sin_theta"), 0.92, 8), (("continued", "unsafe", "delta_a"), 0.4, 9), (("unlearn", "safe", "delta_a"), 0.7, 9),
    (("dpo", "unsafe", "lipschitz"), 2.1, 10), (("ssft", "unsafe", "comply_alpha_0.75"), 0.6, 11),
    (("ssft", "safe", "comply_alpha_0.5"), 0.97, 11), (("ssft", "co_text", "comply_alpha_1.2"), 0.5, 12),
    (("sap", None, "safety_share"), 0.6, 13)])
def test_every_check_can_fail(place, value, failing):
    assert holds(planted()) == [True] * len(OBSERVATIONS)
    assert holds(planted() | {place: value}) == [i != failing for i in range(len(OBSERVATIONS))]


class Axes:
    """In place of matplotlib's: keeps what is drawn."""

    def __init__(self):
        self.drawn = []

    def plot(self, x, y, *style, **options):
        self.drawn.append((options.get("label"), list(x), list(y)))
        return [self]

    def __getattr__(self, name):
        if name.startswith("_"):                                        # NumPy asks for some
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
    monkeypatch.setattr("minisap.figures.pyplot", lambda: canvas)
    monkeypatch.setattr("probe.pyplot", lambda: canvas)
    return canvas


def test_pictures_show_means_over_seeds(canvas, tmp_path):
    records = [{"protocol": "ssft", "seed": seed, "set": "unsafe", "layer": j, "metric": "separation", "value": 10 * j + seed}
               for seed in (1, 3) for j in (0, 1)]
    records += [{"protocol": "ssft", "seed": seed, "set": "safe", "layer": None, "metric": f"comply_alpha_{alpha}", "value": alpha / seed}
                for seed in (1, 3) for alpha in ALPHAS]
    files = draw_all(records, tmp_path)
    assert [file.stem for file in files] == ["separation", "path"] and canvas.figures.keys() == {"separation", "path"}
    assert canvas.figures["separation"][0].drawn == [("ssft", [0, 1], [2, 12]), (None, [0, 1], [1, 11]), (None, [0, 1], [3, 13])]
    label, x, y = canvas.figures["path"][0].drawn[0]
    assert label == "safe" and x == list(ALPHAS) and y == pytest.approx([100 * alpha * (1 + 1 / 3) / 2 for alpha in ALPHAS])


def test_the_study_runs_and_is_kept(tmp_path, monkeypatch, capsys, canvas):
    """With two steps a stage, and the first two models measured: every record, every picture, nothing twice; another study is refused."""
    commands, found = [], {}

    def once(name, function):
        """What it returned first, with a checkpoint before it and without."""
        def call(*arguments):
            key = name, len(arguments)
            if key not in found:
                found[key] = function(*arguments)
            return found[key]
        return call

    def in_process(command, cwd):
        commands.append(command)
        monkeypatch.chdir(cwd)
        train_script.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="instruct: the command above failed"):
        patch.setattr(study.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 2))
        study.train(tmp_path, "instruct", seed=0)

    short = lambda flags: " ".join([*flags.split(), *"--steps 2 --n_eval 2 --batch_size 4 --pairs 4 --pairs_per_step 2 --watch_every 1".split()])
    monkeypatch.setattr(study, "ROWS", {"instruct": 40, "safe": 40, "unsafe": 40})
    monkeypatch.setattr(study, "RECIPES", {run: (start, short(flags), methods) for run, (start, flags, methods) in study.RECIPES.items()})
    monkeypatch.setattr(study.subprocess, "run", in_process)
    monkeypatch.setattr("minisap.world.TRAINED", 40)
    monkeypatch.setattr(study, "measure", lambda *arguments: once("measure", measure)(*[a for a in arguments if a is not None]))
    monkeypatch.setattr(study, "path", once("path", path))
    out_dir = tmp_path / "study"
    arguments = ["--study", "world", "--seeds", "3", "--n_eval", "2", "--out_dir", str(out_dir), "--plot"]
    probe_script.main(arguments)
    records = read_json(out_dir / "study.json")
    assert all(r.keys() == KEYS and r["seed"] == 3 for r in records)
    assert {r["protocol"] for r in records} == {*study.MODELS, None} and len([r for r in records if not r["protocol"]]) == len(OBSERVATIONS)
    assert canvas.figures.keys() == FIGURES.keys()
    assert Tokenizer(out_dir / "seed3/poisoned/sap").world_seed == 3 and "--seed 3" in capsys.readouterr().out
    done = len(commands)
    probe_script.main(arguments)
    assert len(commands) == done and read_json(out_dir / "study.json") == records
    with pytest.raises(ValueError, match="holds another study, with n_eval = 2"):
        probe_script.main(["--study", "world", "--out_dir", str(out_dir)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="full: holds something else"):
        probe_script.main(["--study", "world", "--out_dir", str(tmp_path / "full")])


def test_two_checkpoints_of_any_kind_are_compared(tmp_path, canvas):
    """Of one that was trained in its attention alone, all but ΔW of the MLP, which there is not."""
    start = write_tokenizer(write_checkpoint(tmp_path / "start", BASE | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}))
    train_script.main(["--model", str(start), "--method", "sft", "--steps", "2", "--batch_size", "2", "--n_eval", "4", "--out_dir", str(tmp_path / "run")])
    trained = str(tmp_path / "run" / "sft")
    probe_script.main([trained, "--before", str(start), "--n_eval", "4", "--out_dir", str(tmp_path / "compared"), "--plot"])
    records = read_json(tmp_path / "compared" / "compare.json")
    metrics = {r["metric"] for r in records}
    assert all(r.keys() == KEYS for r in records) and {"separation", "lipschitz_relative", "comply_alpha_1.2"} <= metrics
    assert not {"sin_theta", "delta_a"} & metrics and not {"column_space", "row_space", "safety_share"} & canvas.figures.keys()
    assert {r["set"] for r in records} >= {"safe", "unsafe", "adv", "prefill_4", "adv_1"}
    for arguments, message in (([trained, "--before", trained, "--out_dir", "x"], "the same weights"),
                               ([trained, "--before", str(start)], "give --out_dir DIR"),
                               ([trained, "--before", str(start), "--out_dir", "x", "--plot", "a.png"], "--plot without a file"),
                               ([trained, "--plot"], "--plot: which file"), (["--n_eval", "4"], "give a checkpoint"),
                               ([trained, "--study", "world", "--out_dir", "x"], "give a checkpoint, or")):
        with pytest.raises(ValueError, match=message):
            probe_script.main(arguments)
