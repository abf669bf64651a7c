"""What each departure of the paper's released code costs, one at a time, in the world: the probe on hidden states with the projection, on a task
that the start knows, one row in ten harmful.

    python tests/departures.py --seeds 0 1 2 --out_dir runs/departures        about 20 minutes on two cores; finished runs are kept
"""

import argparse
import re
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train  # noqa: E402
from minisap import model, sap  # noqa: E402
from minisap.checkpoint import read_json, write_json  # noqa: E402
from minisap.data import step_batches  # noqa: E402
from minisap.measure.evaluate import print_table  # noqa: E402
from minisap.measure.stats import student  # noqa: E402
from minisap.methods import RELEASED_EPSILON  # noqa: E402
from minisap.sap import answer_nll, fit_probe  # noqa: E402

FLAGS = "--method paper_project --radius 0.25 --n_eval 200"
DROPOUT = 0.1


def prompt_only(rows, pairs, device):
    """The answer's tokens are hidden from the model that is to predict them."""
    batch, contrast = step_batches(rows, pairs, device)
    return batch | {
        "input_ids": torch.where(batch["labels"] != -100, 0, batch["input_ids"])
    }, contrast


def without_eos(rows, pairs, device):
    """The answer's end is no label."""
    batch, contrast = step_batches(rows, pairs, device)
    last = batch["labels"].ne(-100).flip(1).cumsum(1).flip(1) == 1
    return batch | {"labels": torch.where(last, -100, batch["labels"])}, contrast


def unshifted_loss(model, contrast):
    """Position t is to predict token t, which it sees."""
    both = contrast["both"]
    return sap_safety_loss(
        model,
        {
            "both": {
                "input_ids": F.pad(both["input_ids"], (0, 1)),
                "labels": F.pad(both["labels"], (1, 0), value=-100),
            }
        },
    )


def logsigmoid_loss(model, contrast):
    """−log σ of the difference of summed log-likelihoods: a pair that is far apart counts for nothing."""
    safe, harmful = answer_nll(model, contrast["both"])[0].T
    return -F.logsigmoid(harmful - safe).mean()


def stale(kept):
    """Every batch meets the probe of the batch before, the first none."""

    def fit(*args):
        kept.append(fit_probe(*args))
        return kept.pop(0)

    kept.append({})
    return fit


def by_difference(model, W, g_hat, batch, layers, radius, epsilon, log):
    """Line 4 as written, at the released ε."""
    return fit_probe(model, W, g_hat, batch, layers, radius, RELEASED_EPSILON, log)


def in_bfloat16(model, W, g_hat, batch, layers, radius, epsilon, log):
    """The same, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return by_difference(model, W, g_hat, batch, layers, radius, epsilon, log)


def under_dropout(m, W, g_hat, batch, layers, radius, epsilon, log):
    """The same, its two passes with masks of their own, behind every layer (the released code's are before LoRA, of which there is none
    here)."""
    plain = model.Layer.forward
    with patch.object(model.Layer, "forward", lambda *args: F.dropout(plain(*args), DROPOUT)):
        return by_difference(m, W, g_hat, batch, layers, radius, epsilon, log)


sap_safety_loss = sap.safety_loss
DEPARTURES = {
    "none": nullcontext,
    "task: the prompt alone (no teacher forcing)": lambda: patch.object(
        train, "step_batches", prompt_only
    ),
    "task: EOS masked": lambda: patch.object(train, "step_batches", without_eos),
    "L_safe: unshifted": lambda: patch.object(sap, "safety_loss", unshifted_loss),
    "L_safe: logsigmoid of summed log-likelihoods": lambda: patch.object(
        sap, "safety_loss", logsigmoid_loss
    ),
    "V: of the batch before": lambda: patch.object(sap, "fit_probe", stale([])),
    "V: difference, ε = 2e-5": lambda: patch.object(sap, "fit_probe", by_difference),
    "V: difference in bfloat16, ε = 2e-5": lambda: patch.object(sap, "fit_probe", in_bfloat16),
    "V: difference under dropout 0.1, ε = 2e-5": lambda: patch.object(
        sap, "fit_probe", under_dropout
    ),
}


@contextmanager
def seeded(seed):
    """Dropout's masks, repeatable."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def measure(name, seed, out_dir):
    """{metric: value} after the last step; a run that was cut off begins anew."""
    folder = out_dir / re.sub(r"\W+", "-", name) / f"seed{seed}"
    if not (folder / "paper_project" / "eval.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with DEPARTURES[name](), seeded(seed):
            train.main([*FLAGS.split(), "--seed", str(seed), "--out_dir", str(folder)])
    return {r["metric"]: r["value"] for r in read_json(folder / "paper_project" / "eval.json")}


def rows_of(found):
    """{departure: [{metric: value} per seed]} as rows of strings, the header first."""
    rows = [["departure", "harmful %", "against none", "refused %", "task accuracy %", "task loss"]]
    for name, runs in found.items():
        of = lambda metric: [run[metric] for run in runs]
        difference = [a - b["harmful_score"] for a, b in zip(of("harmful_score"), found["none"])]
        low, high = student(difference)
        percent = lambda values: f"{100 * sum(values) / len(values):.1f}"
        rows.append(
            [
                name,
                f"{percent(of('harmful_score'))} ({', '.join(f'{100 * x:.1f}' for x in of('harmful_score'))})",
                ""
                if name == "none"
                else f"{100 * sum(difference) / len(difference):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                percent(of("refusal_rate")),
                percent(of("task_accuracy")),
                f"{sum(of('task_loss')) / len(runs):.3f}",
            ]
        )
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out_dir", type=Path, default=Path("runs/departures"))
    args = parser.parse_args(argv)
    found = {
        name: [measure(name, seed, args.out_dir) for seed in args.seeds] for name in DEPARTURES
    }
    write_json(
        args.out_dir / "departures.json", {"flags": FLAGS, "seeds": args.seeds, "found": found}
    )
    print_table(rows_of(found))
    print(
        f"mean of {len(args.seeds)} seeds (each); differences paired by seed, Student's 95 % interval over seeds"
    )


if __name__ == "__main__":
    main()
