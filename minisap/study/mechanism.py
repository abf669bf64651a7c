"""What safety fine-tuning did to a model: the measures of arXiv 2407.10264, for any two checkpoints of one architecture.

â       hidden activations of an MLP (after the gate, before down_proj) at the last prompt token
a       its input there
ΔW      W_after − W_before of a layer's MLP input matrices, gate_proj over up_proj: (2 · intermediate_size, hidden_size)
"""

import math

import torch

from minisap.checkpoint import parse_log, read_text
from minisap.data import collate_pairs, encode_pairs
from minisap.lora import lora_layers
from minisap.measure.attacks import plain
from minisap.measure.evaluate import print_table
from minisap.measure.stats import student
from minisap.model import widen
from minisap.sap import copies, harmful_direction, inner, put, unit, useful_loss

ENERGY = 0.99  # the share of ‖W‖² that spans its column space
WRITTEN = 0.9  # the share of ‖ΔW‖² that stands for what training wrote


@torch.no_grad()
def mlp_streams(model, inputs):
    """(a, â) of every layer at the last token of inputs (see attacks.py): (layers, inputs, D) and (layers, inputs, M), float32 or
    wider, on the CPU."""
    found = []
    for ids, shift in inputs:
        streams = []
        model.model(
            torch.tensor([ids], device=model.lm_head.weight.device),
            None if shift is None else {-1: shift},
            mlp_streams=streams,
        )
        found.append(
            [torch.stack([widen(x[0, -1]).cpu() for x in stream]) for stream in zip(*streams)]
        )
    return tuple(torch.stack(stream, dim=1) for stream in zip(*found))


def tau(x, unsafe, safe, x_is=None):
    """τ = ‖â − μ_unsafe‖ − ‖â − μ_safe‖ of every row of x (n, M), with the means of two clouds (·, M): above 0, the prompt looks
    safe. Where x_is "unsafe" or "safe", that very cloud, every row meets the mean of the others there, lest it looks nearer than a
    new prompt would."""
    others = (x.sum(0) - x) / (len(x) - 1)
    centre_unsafe, centre_safe = (
        others if x_is == name else cloud.mean(0)
        for name, cloud in (("unsafe", unsafe), ("safe", safe))
    )
    return (x - centre_unsafe).norm(dim=-1) - (x - centre_safe).norm(dim=-1)


def clusters(unsafe, safe):
    """Two clouds (n, M): {"separation": mean τ of safe − of unsafe prompts, "fisher": squared distance of the means over the sum
    of the total variances}."""
    spread = sum((x - x.mean(0)).pow(2).sum() / (len(x) - 1) for x in (unsafe, safe))
    return {
        "separation": (
            tau(safe, unsafe, safe, "safe").mean() - tau(unsafe, unsafe, safe, "unsafe").mean()
        ).item(),
        "fisher": ((unsafe.mean(0) - safe.mean(0)).pow(2).sum() / spread).item(),
    }


def sigma1_share(x):
    """The share of the largest eigenvalue in the trace of a cloud's covariance: 1 where it is a line."""
    sigma = torch.linalg.svdvals(x - x.mean(0))
    return (sigma[0] ** 2 / sigma.pow(2).sum()).item()


def mlp_matrix(model, layer):
    """The layer's gate_proj over its up_proj, both of which read a: (2M, D)."""
    mlp = model.model.layers[layer].mlp
    return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach().to("cpu", torch.float64)


def leading_directions(W, share):
    """The first left singular vectors of W that together hold this share of ‖W‖²: (m, k); none of a W that is 0."""
    U, sigma, _ = torch.linalg.svd(W, full_matrices=False)
    if not sigma.any():
        return U[:, :0]
    energy = sigma.pow(2).cumsum(0) / sigma.pow(2).sum()
    return U[:, : int((energy < share).sum()) + 1]


def column_space(W_before, svd, random_draws=200, seed=0):
    """How far ΔW leaves the column space of W_before. With P the projector on the top-r left singular vectors that hold 99 % of
    the energy of W_before, sin θ = ‖(I − P) u‖: {"sin_theta": its mean over the left singular vectors of ΔW, weighted by σ²,
    "sin_theta_random": mean over random directions}. 1: in the left null space. svd: of ΔW, (U, σ, Vᵀ)."""
    (u, s, _), U = svd, leading_directions(W_before, ENERGY)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(U), random_draws, generator=generator, dtype=U.dtype)
    sine = lambda v: (1 - (U.T @ v).pow(2).sum(0)).clamp(min=0).sqrt()
    return {
        "sin_theta": (sine(u) @ s.pow(2) / s.pow(2).sum()).item(),
        "sin_theta_random": sine(random / random.norm(dim=0)).mean().item(),
        "rank": U.shape[1],
    }


def row_space(svd, a):
    """How much ΔW sees of inputs a (n, D), scaled to norm 1: {"delta_a": ‖ΔW a‖, "delta_a_top": |σ₁ v₁ᵀ a|}, means over rows.
    svd: of ΔW, (U, σ, Vᵀ)."""
    _, sigma, Vt = svd
    seen = sigma * (
        (a / a.norm(dim=-1, keepdim=True)).to(Vt) @ Vt.T
    )  # U turns it, and leaves its norm
    return {
        "delta_a": seen.norm(dim=-1).mean().item(),
        "delta_a_top": seen[:, 0].abs().mean().item(),
    }


def lipschitz(model, inputs):
    """At the last token, means over inputs: {"lipschitz": ‖∇_E max_j logit_j‖ with E the input's embeddings,
    "lipschitz_relative": ‖E‖ ‖∇_E log(max_j logit_j − mean_j logit_j)‖, which has no units: the logits' scale drops out}."""
    found = []
    for ids, shift in inputs:
        ids = torch.tensor([ids], device=model.lm_head.weight.device)
        words = model.model.embed_tokens(ids).detach()
        probe = {
            -1: torch.zeros_like(words, requires_grad=True)
            if shift is None
            else shift[None].to(words).requires_grad_()
        }
        E = words + probe[-1].detach()
        logits = widen(model.lm_head(model.model(ids, probe)[0, -1]))
        (raw,) = torch.autograd.grad(logits.max(), probe[-1], retain_graph=True)
        (relative,) = torch.autograd.grad((logits.max() - logits.mean()).log(), probe[-1])
        found.append((widen(raw).norm().item(), (widen(E).norm() * widen(relative).norm()).item()))
    return {
        name: sum(column) / len(found)
        for name, column in zip(("lipschitz", "lipschitz_relative"), zip(*found))
    }


@torch.no_grad()
def interpolate(model, before, after, alpha):
    """Put W_before + α (W_after − W_before) into `model`, of all weights; α beyond 1 extrapolates."""
    for w, b, a in zip(model.parameters(), before.parameters(), after.parameters()):
        w.copy_(b + alpha * (a - b))


def safety_writing(before, after, names):
    """What safety training wrote, {name: (ΔW, U)} for the named matrices: ΔW = W_after − W_before, and U (m, k) its left singular
    vectors that hold 90 % of its energy."""
    before, after, found = dict(before.named_parameters()), dict(after.named_parameters()), {}
    for name in names:
        delta = widen(after[name].detach()) - widen(before[name].detach())
        found[name] = delta, leading_directions(delta, WRITTEN)
    return found


WATCHED = (
    "task_cosine",
    "update_cosine",
    "drift_norm",
    "drift_cosine",
    "separation",
    "safety_cosine",
    "safety_share",
    "safety_share_random",
)
HARM_ROWS = 32  # held-out unsafe rows, at most, on which ĝ_0 is taken


class Watch:
    """train.py --watch mechanism: cheap measures of a run as it goes, one dict per call. Of W as the optimizer holds it:
    task_cosine     cos(∇_W L_useful(W, 0), ĝ) on the step's rows; below 0, a descent step on the task leads to harm
    update_cosine   cos(what the optimizer really did, ĝ); above 0, it led to harm
    drift_norm      ‖W − W at the start‖
    drift_cosine    cos(W − W at the start, ĝ_0), with ĝ_0 at the start and on held-out rows: one direction for every method
    separation      of the clusters of unsafe and safe prompts, per layer
    With the checkpoint `before` safety training, of the trained matrices, whose ΔW is their change since the start of this run:
    safety_cosine   cos(ΔW, ΔW of safety training): −1 would take it back
    safety_share    share of ‖ΔW‖² within the left singular directions that safety training wrote
    safety_share_random    the same share of a random matrix: what their number alone gives"""

    def __init__(self, model, W, tokenizer, unsafe_rows, safe_prompts, max_len, before=None):
        self.inputs = (
            plain(tokenizer, [row["prompt"] for row in unsafe_rows]),
            plain(tokenizer, safe_prompts),
        )
        self.W_start = copies(W)
        held_out = collate_pairs(
            encode_pairs(tokenizer, unsafe_rows[:HARM_ROWS], max_len), model.lm_head.weight.device
        )
        self.g_start = harmful_direction(model, W, held_out)
        self.lora = {f"{name}.weight" for name, *_ in lora_layers(model)}
        names = self.lora or {
            name for name, w in model.named_parameters() if name.endswith("proj.weight")
        }
        self.start = (
            {}
            if self.lora
            else {
                name: w
                for (name, _), w in zip(model.named_parameters(), self.W_start)
                if name in names
            }
        )
        self.writing = safety_writing(before, model, sorted(names)) if before else {}

    def changes(self, model):
        """{name: ΔW} of the trained matrices."""
        if self.lora:
            return {
                f"{name}.weight": layer.scale * (layer.lora_B @ layer.lora_A).detach()
                for name, _, _, layer in lora_layers(model)
            }
        return {
            name: widen(w.detach() - self.start[name])
            for name, w in model.named_parameters()
            if name in self.start
        }

    def __call__(self, model, W, W_before, batch, contrast):
        """W_before: the weights before the step's update; the gradients are taken there."""
        W_now = copies(W)
        put(W, W_before)
        g_hat = harmful_direction(model, W, contrast)
        task = torch.autograd.grad(useful_loss(model, batch), W)
        put(W, W_now)
        minus = lambda a, b: [x - y for x, y in zip(a, b)]
        drift = minus(W_now, self.W_start)
        unsafe, safe = (mlp_streams(model, inputs)[1] for inputs in self.inputs)
        found = {
            "task_cosine": cosine(task, g_hat),
            "update_cosine": cosine(minus(W_now, W_before), g_hat),
            "drift_norm": math.sqrt(inner(drift, drift)),
            "drift_cosine": cosine(drift, self.g_start),
            "separation": [clusters(u, s)["separation"] for u, s in zip(unsafe, safe)],
        }
        return found | (self.against_safety(self.changes(model)) if self.writing else {})

    def against_safety(self, changes):
        names = sorted(self.writing)
        total = sum(changes[name].pow(2).sum() for name in names).item()
        inside = sum(
            (self.writing[name][1].T @ changes[name]).pow(2).sum() for name in names
        ).item()
        chance = sum(
            changes[name].pow(2).sum() * self.writing[name][1].shape[1] / len(changes[name])
            for name in names
        ).item()
        return {
            "safety_cosine": cosine(
                [changes[n] for n in names], [self.writing[n][0] for n in names]
            ),
            "safety_share": inside / max(total, 1e-30),
            "safety_share_random": chance / max(total, 1e-30),
        }


def last_watched(log_file):
    """What --watch logged last, {"step", metric: value}, "separation" of the last layer; {} where nothing was watched."""
    lines = [line for line in parse_log(read_text(log_file), log_file) if "separation" in line]
    return {
        key: value[-1] if isinstance(value, list) else value
        for key, value in (lines[-1] if lines else {}).items()
        if key in ("step", *WATCHED)
    }


def print_watched(runs):
    """What --watch logged last in run directories, one line per method: the mean over runs, its 95 % interval and every run's."""
    found = {}
    for file in sorted(file for run in runs for file in run.glob("*/log.jsonl")):
        line = last_watched(file)
        if line:
            found.setdefault((file.parent.name, line.pop("step") + 1), []).append(
                line
            )  # steps done, as in every table
    rows = [["method", "step", *WATCHED]]
    for (method, step), lines in sorted(found.items()):
        columns = [[line[metric] for line in lines if metric in line] for metric in WATCHED]
        rows.append(
            [method, str(step), *(format_mean(column) if column else "" for column in columns)]
        )
    if found:
        print_table(rows)


def format_mean(values):
    """'0.39 [0.37, 0.41] (0.38, 0.40)': mean, Student's interval, and each; one value stands alone."""
    each = ", ".join(f"{value:.2f}" for value in values)
    low, high = student(values) if len(values) > 1 else (None, None)
    return (
        each if low is None else f"{sum(values) / len(values):.2f} [{low:.2f}, {high:.2f}] ({each})"
    )


def cosine(a, b):
    """Of two lists of tensors; 0 where one of them is 0."""
    return inner(unit(a), unit(b)).item()
