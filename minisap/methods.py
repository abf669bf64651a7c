"""Every way to fine-tune, behind one signature:  method(model, W, batch, contrast, args, state) -> (gradient, log).

batch   the task's examples;  contrast: answers to the same unsafe prompts, safe and harmful, see collate_pairs in data.py
args    gate, projection, safety_weight, refusal_weight, refresh, layers, radius, epsilon, seed, steps, strength: see train.py --help
state   {"step": the number of this one} and whatever tensors and numbers the method keeps there; it is saved with the run
A method may choose its rows before the first step (FILTERS, below), and change W after the last (ENDINGS, in rivals.py).
"""

import time
from contextlib import contextmanager

import numpy as np
import torch

from minisap.alignment import ALIGN, pretrain
from minisap.baselines import RIVALS, task_step
from minisap.checkpoint import write_json
from minisap.data import rows_of_run
from minisap.model import widen
from minisap.sap import (
    fit_rows,
    gradient,
    harmful_direction,
    mean_harmful_tokens,
    median_norm,
    paper_step,
    probe_gradient_by_difference,
    safety_gradient,
    sap_step,
    useful_loss,
)
from minisap.support import distributed as parallel
from minisap.support.errors import NotFinite

FORWARD_BATCHES = 4  # the filter asks the rows of so many batches at a time: forward mode keeps nothing for a backward pass
WARN_ABOVE = (
    1 / 4
)  # the share of the rows that nobody marked as poisoned beyond which leaving them out is worth a warning


def sft(model, W, batch, contrast, args, state):
    """Supervised fine-tuning: ∇_W L_useful."""
    return task_step(model, W, batch)


def sap(model, W, batch, contrast, args, state):
    """Safety-Aware Probing with the probe on the rows (see choose_rows), the projection and the safety loss's own gradient; see sap.py."""
    return sap_step(
        model,
        W,
        batch,
        contrast,
        state,
        projection=args.projection == "on",
        safety_weight=args.safety_weight,
        refusal_weight=args.refusal_weight,
        refresh=args.refresh,
    )


def choose_rows(model, W, task, pairs, args):
    """What sap does before its first step: for each of the task's examples, whether it is kept, by all of the contrastive pairs; None for those that the
    run does not come to."""
    places = rows_of_run(len(task), args.batch_size, args.steps, args.seed)
    kept = [True] * len(places)
    if args.gate:
        g_safe = safety_gradient(model, W, pairs, args.pairs_per_step)
        kept = fit_rows(
            model,
            W,
            g_safe,
            [task[i] for i in places],
            args.gate,
            mean_harmful_tokens(pairs),
            FORWARD_BATCHES * args.batch_size,
        ).tolist()
    of_place = dict(zip(places, kept))
    return [of_place.get(i) for i in range(len(task))]


def filter_report(task, kept):
    """What choose_rows came to, as numbers of rows, and the sources of those that it leaves out; of rows that say so themselves, it is
    known whether they are poisoned."""
    asked = [(example, one) for example, one in zip(task, kept) if one is not None]
    out = [example for example, one in asked if not one]
    return {
        "rows": len(asked),
        "left_out": len(out),
        "poisoned": sum(example["poisoned"] for example, _ in asked),
        "poisoned_left_out": sum(example["poisoned"] for example in out),
        "sources_left_out": [example["source"] for example in out],
    }


def paper(model, W, batch, contrast, args, state):
    """Safety-Aware Probing as published (arXiv 2505.16737), as far as we know it: the probe on hidden states, nothing more. β is
    replaced by a norm (see fit_probe), and line 4 is exact, unless --epsilon asks for a difference."""
    return paper_step(
        model,
        W,
        batch,
        contrast,
        state,
        args.layers,
        args.radius,
        args.epsilon,
        refresh=args.refresh,
    )


def paper_project(model, W, batch, contrast, args, state):
    """The same, and sap's projection after it."""
    return paper_step(
        model,
        W,
        batch,
        contrast,
        state,
        args.layers,
        args.radius,
        args.epsilon,
        projection=True,
        refresh=args.refresh,
    )


def project(model, W, batch, contrast, args, state):
    """The projection alone: gradient surgery against the safety gradient (as PCGrad, arXiv 2001.06782, one-sided)."""
    return sap_step(model, W, batch, contrast, state, projection=True)


def random_probe(model, W, batch, contrast, args, state):
    """Control: a probe on hidden states with the paper's norms and a random direction. Does noise alone protect?"""
    random, hidden = np.random.default_rng([args.seed, 2, state["step"]]), []
    with torch.no_grad():
        useful_loss(model, batch, hidden=hidden)
    V = {}
    for j in args.layers:
        noise = widen(torch.tensor(random.standard_normal(model.config.hidden_size)).to(hidden[j]))
        V[j] = args.radius * median_norm(hidden[j], batch) * noise / noise.norm()
    loss = useful_loss(model, batch, V)
    return gradient(loss, W), {"loss": loss.item()}


RELEASED_LAYERS, RELEASED_EPSILON, RELEASED_LR = (3, 9), 2e-5, 0.05  # layers of 32


def released(model, W, batch, contrast, args, state):
    """The schedule of the paper's released code: V is fitted after the weight step, so that a batch is trained with the probe
    of the batch before; V takes one AdamW step from zero along a finite difference; layers 3 and 9 of 32; no projection."""
    V, layers = None, sorted({model.config.n_layers * j // 32 for j in RELEASED_LAYERS})
    if "batch" in state:
        g_hat = harmful_direction(model, W, contrast)
        d, _ = probe_gradient_by_difference(
            model, W, g_hat, state["batch"], layers, RELEASED_EPSILON
        )
        V = {j: adam_step_from_zero(d_j, state, j) for j, d_j in d.items()}
    state["batch"] = batch
    loss = useful_loss(model, batch, V)
    return gradient(loss, W), {"loss": loss.item()}


def adam_step_from_zero(d, state, j, beta_1=0.9, beta_2=0.999):
    """Adam's ascent step of size RELEASED_LR along d, its moments kept in `state` under layer j."""
    m, v, count = state.get(j, (torch.zeros_like(d), torch.zeros_like(d), 0))
    m, v, count = beta_1 * m + (1 - beta_1) * d, beta_2 * v + (1 - beta_2) * d * d, count + 1
    state[j] = m, v, count
    return RELEASED_LR * (m / (1 - beta_1**count)) / ((v / (1 - beta_2**count)).sqrt() + 1e-8)


READ_BY = {
    "gate": ("sap",),
    "projection": ("sap",),
    "safety_weight": ("sap",),
    "refusal_weight": ("sap",),
    "refresh": ("sap", "paper", "paper_project"),
    "epsilon": ("paper", "paper_project"),
    "radius": ("paper", "paper_project", "random_probe"),
    "layers": ("paper", "paper_project", "random_probe", "steer", "steer_project"),
}
FILTERS = {"sap": choose_rows}  # before the first step, by the start's weights
PAIRLESS = (
    "sft",
    "random_probe",
    "pretrain",
    "sam",
    "constrained",
    "ema",
    "safelora",
)  # these make no use of contrastive pairs
METHODS = {
    "sft": sft,
    "sap": sap,
    "paper": paper,
    "paper_project": paper_project,
    "project": project,
    "random_probe": random_probe,
    "released": released,
    **RIVALS,
    **ALIGN,
    "pretrain": pretrain,
}


@contextmanager
def own_mistakes(method):
    """Within: a ValueError is a mistake of the method, not of an input, and keeps its traceback."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(f"--method {method}: {error}") from error


def filter_rows(args, method, model, W, task, pairs, state, out_dir):
    """state["kept"]: which examples the method will train on; what that came to is left in filter.json, and told."""
    began = time.perf_counter()
    try:
        with parallel.together(), own_mistakes(method):
            state["kept"] = FILTERS[method](model, W, task, pairs, args)
    except NotFinite as error:
        raise NotFinite(f"{method}, before the first step: {error}") from None
    state["seconds"] = time.perf_counter() - began
    found = filter_report(task, state["kept"])
    if parallel.leads():
        write_json(out_dir / "filter.json", found)
    unmarked, unmarked_out = (
        found["rows"] - found["poisoned"],
        found["left_out"] - found["poisoned_left_out"],
    )
    parts = (
        f": {found['poisoned_left_out']:,} of the {found['poisoned']:,} marked as poisoned, {unmarked_out:,} of the {unmarked:,} others"
        if found["poisoned"]
        else ""
    )
    print(
        f"{method} leaves out {found['left_out']:,} of the {found['rows']:,} task rows of its {args.steps} steps{parts}"
    )
    if unmarked_out > WARN_ABOVE * unmarked:
        print(
            f"{unmarked_out:,} of the {unmarked:,} rows that nobody marked as poisoned are left out ({out_dir / 'filter.json'} says which): if they are harmless, "
            "a larger --gate leaves out fewer"
        )
