"""Other ways to keep safety, each behind the signature of methods.py: method(model, W, batch, contrast, args, state) -> (gradient, log).
All see the same contrastive rows. Each has one knob, args.strength[method]; at 0 it is SFT, bit for bit (booster: mix; vaccine: mix,
to rounding; steer_project: project; lisa: SFT but for every tenth step).

In place of fine-tuning   mix, sam, lisa, kl, constrained, penalty, steer, steer_project
Before it                 vaccine, booster: training stages on harmless rows, after which plain SFT follows (STAGES)
After it                  ema, safelora: SFT, whose weights are changed when it is done (ENDINGS)
"""

import re

import torch
import torch.nn.functional as F

from minisap.alignment import answer_loss, at_start
from minisap.lora import lora_layers
from minisap.losses import prefixes_of, response_nll, token_nll
from minisap.model import widen
from minisap.sap import (
    copies,
    gradient,
    harmful_direction,
    inner,
    median_norm,
    project_out_harm,
    put,
    safety_loss,
    unit,
    useful_loss,
    weights_at,
)
from minisap.study.mechanism import WRITTEN, leading_directions

# The papers' own where they have this knob; kl's and penalty's are 1, steer's a radius, safelora's is of another projector (see there).
STRENGTH = {
    "mix": 1.0,
    "sam": 0.05,
    "lisa": 1.0,
    "kl": 1.0,
    "constrained": 1.0,
    "penalty": 1.0,
    "steer": 0.002,
    "steer_project": 0.002,
    "vaccine": 2.0,
    "booster": 5.0,
    "ema": 0.99,
    "safelora": 0.5,
}
LISA_PERIOD = 10  # one step on safe answers in every ten steps: the paper's 100 and 900
BOOSTER_STEP = 0.1  # Booster's α, the length of the harmful step that it simulates
FIRST_TOKENS = (0.5, 2.0, 2.0, 2.0, 2.0)  # β of the answer's first five tokens, constrained SFT's
LATER_TOKENS = 0.1  # and of all others


def parse_strength(pairs):
    """METHOD=VALUE texts over the defaults: {method: value}."""
    found = dict(STRENGTH)
    for pair in pairs:
        method, _, value = pair.partition("=")
        if (
            method not in STRENGTH
            or not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value)
            or float(value) > (1 if method == "ema" else 1e9)
        ):
            raise ValueError(
                f"--strength {pair}: expected METHOD=VALUE, a number from 0 up (ema: to 1) for one of {', '.join(STRENGTH)}"
            )
        found[method] = float(value)
    return found


def task_step(model, W, batch):
    """SFT's."""
    loss = useful_loss(model, batch)
    return gradient(loss, W), {"loss": loss.item()}


def gradient_at(W, shift, loss):
    """(∇_W loss(), loss()) at W + shift."""
    with weights_at(W, [w.detach() + s for w, s in zip(W, shift)]):
        value = loss()
        return gradient(value, W), value.item()


def mix(model, W, batch, contrast, args, state):
    """SafeInstr (arXiv 2309.07875): the same safe answers that SAP contrasts, as more rows of the task batch; the knob weighs them."""
    loss = alignment_loss(model, batch, contrast, args.strength["mix"])
    return gradient(loss, W), {"loss": loss.item()}


def sam(model, W, batch, contrast, args, state):
    """Sharpness-aware minimisation (arXiv 2010.01412): the gradient at W + ρ g / ‖g‖."""
    g = gradient(useful_loss(model, batch), W)
    shift = [(args.strength["sam"] * u).to(w.dtype) for u, w in zip(unit(g), W)]
    g_W, loss = gradient_at(W, shift, lambda: useful_loss(model, batch))
    return g_W, {"loss": loss}


def lisa(model, W, batch, contrast, args, state):
    """Lisa (arXiv 2405.18641): a step on safe answers after every nine on the task, either drawn back to the weights at which
    the other left off, by ρ/2 ‖W − W_switch‖²."""
    safe_turn = state["step"] % LISA_PERIOD == LISA_PERIOD - 1
    if safe_turn or state["step"] % LISA_PERIOD == 0:
        state["W_switch"] = copies(W)
    loss = useful_loss(model, contrast["safe"] if safe_turn else batch)
    g_W = gradient(loss, W)
    pull = args.strength["lisa"]
    return [g + pull * (w.detach() - old) for g, w, old in zip(g_W, W, state["W_switch"])], {
        "loss": loss.item()
    }


def kl(model, W, batch, contrast, args, state):
    """L_useful + λ KL(start ‖ now), mean over the tokens of the contrast's safe answers: stay near the aligned model there."""

    def log_probabilities():
        safe = contrast["safe"]
        x, labels = model.model(safe["input_ids"], prefixes=prefixes_of(safe)), safe["labels"]
        return F.log_softmax(
            widen(model.lm_head(x[:, :-1][labels[:, 1:] != -100])), dim=-1
        )  # (N, V)

    before = at_start(W, state, log_probabilities)
    loss = useful_loss(model, batch)
    away = F.kl_div(log_probabilities(), before, log_target=True, reduction="batchmean")
    return gradient(loss + args.strength["kl"] * away, W), {"loss": loss.item(), "kl": away.item()}


def constrained(model, W, batch, contrast, args, state):
    """Constrained SFT (arXiv 2406.05946): −Σ_t 2/β_t log σ(β_t log p(y_t) / p_start(y_t)), whose gradient is the cross-entropy's with
    token t weighted by 2 σ(−β_t log …): what has left the start far behind in the first five tokens counts little. The knob
    scales every β_t."""
    before = at_start(W, state, lambda: token_nll(model, batch)[0])
    nll, rows, places = token_nll(model, batch)
    answer = (
        (batch["labels"] != -100).to(torch.long).cumsum(1)[rows, places]
    )  # 1 at the answer's first token
    beta = torch.tensor([*FIRST_TOKENS, LATER_TOKENS], dtype=nll.dtype, device=nll.device)[
        answer.clamp(max=len(FIRST_TOKENS) + 1) - 1
    ]
    weight = 2 * torch.sigmoid(args.strength["constrained"] * beta * (nll.detach() - before))
    nats = torch.zeros(len(batch["labels"]), dtype=nll.dtype, device=nll.device).index_add(
        0, rows, weight * nll
    )  # by row, as SFT adds
    return gradient(nats.sum() / len(nll), W), {"loss": nll.mean().item()}


def penalty(model, W, batch, contrast, args, state):
    """Control: L_useful + λ L_safe. What does SAP do with its pairs that the safety loss as a penalty would not?"""
    loss = useful_loss(model, batch)
    return gradient(loss + args.strength["penalty"] * safety_loss(model, contrast), W), {
        "loss": loss.item()
    }


def steer(model, W, batch, contrast, args, state):
    """Preventative steering (arXiv 2507.21509): a constant probe along mean hidden state of harmful − of safe answers, by the start
    model and the first step's pairs, with norms like SAP's; the knob is its radius."""
    return steered(model, W, batch, contrast, args.layers, args.strength["steer"], state)


def steer_project(model, W, batch, contrast, args, state):
    """Control: steer with its own knob, and SAP's projection after it. Is a fitted probe better than a constant one?"""
    g_W, log = steered(
        model, W, batch, contrast, args.layers, args.strength["steer_project"], state
    )
    g_hat = harmful_direction(model, W, contrast)
    return project_out_harm(g_W, g_hat), log | {"conflict": inner(g_W, g_hat).item()}


def steered(model, W, batch, contrast, layers, radius, state):
    """(gradient, log) under the constant probe of this radius."""
    if "V" not in state:
        with torch.no_grad():
            harmful, safe = (
                mean_states(model, contrast[key], layers) for key in ("harmful", "safe")
            )
        state["V"] = {
            j: radius * harmful[j][1] * unit([harmful[j][0] - safe[j][0]])[0] for j in layers
        }
    loss = useful_loss(model, batch, state["V"] if radius else None)
    return gradient(loss, W), {"loss": loss.item()}


def mean_states(model, batch, layers):
    """{layer: (mean hidden state of the answers' tokens (D,), their median norm)}."""
    hidden = []
    useful_loss(model, batch, hidden=hidden)
    return {
        j: (widen(hidden[j])[batch["labels"] != -100].mean(0), median_norm(hidden[j], batch))
        for j in layers
    }


def alignment_loss(model, batch, contrast, weight=1.0, probe=(None, None)):
    """What mix minimises: cross-entropy of the task's answers and, each token with this weight, of the safe ones, per token."""
    (task, n), (safe, m) = (
        response_nll(model, one, V) for one, V in zip((batch, contrast["safe"]), probe)
    )
    return (task.sum() + weight * safe.sum()) / (n.sum() + weight * m.sum())


def vaccine(model, W, batch, contrast, args, state):
    """Vaccine (arXiv 2402.01109): align under the worst small perturbation of the hidden states, ρ ∇ / ‖∇‖ over all layers and
    tokens."""
    layers = range(model.config.n_layers)
    V = [
        {
            j: widen(
                torch.zeros(
                    *one["input_ids"].shape,
                    model.config.hidden_size,
                    device=one["input_ids"].device,
                )
            ).requires_grad_()
            for j in layers
        }
        for one in (batch, contrast["safe"])
    ]
    flat = [v for probe in V for v in probe.values()]
    worst = unit(gradient(alignment_loss(model, batch, contrast, probe=V), flat))
    for v, u in zip(flat, worst):
        put([v], [args.strength["vaccine"] * u])
    loss = alignment_loss(model, batch, contrast, probe=V)
    return gradient(loss, W), {"loss": loss.item()}


def booster(model, W, batch, contrast, args, state):
    """Booster (arXiv 2409.01586): align so that a step on harmful answers gains little: ∇L + λ (∇h(W) − ∇h(W − α ∇h / ‖∇h‖)),
    h the loss of the harmful answers."""
    harm = lambda: answer_loss(model, contrast["harmful"]).mean()
    loss = alignment_loss(model, batch, contrast)
    g_W, here = gradient(loss, W), gradient(harm(), W)
    there, _ = gradient_at(
        W, [(-BOOSTER_STEP * u).to(w.dtype) for u, w in zip(unit(here), W)], harm
    )
    log = {"loss": loss.item(), "harm_cosine": inner(unit(here), unit(there)).item()}
    return [g + args.strength["booster"] * (a - b) for g, a, b in zip(g_W, here, there)], log


def ema(model, W, batch, contrast, args, state):
    """SFT whose weights are averaged along the run (arXiv 2508.12531): it ends with their exponential moving average, begun at the
    start; the knob is its decay."""
    if "average" not in state:
        state["average"] = copies(W)
    for mean, w in zip(state["average"], W):
        mean.lerp_(w.detach(), 1 - args.strength["ema"])
    return task_step(model, W, batch)


@torch.no_grad()
def end_ema(model, W, args, state, before):
    put(
        W, [mean.lerp(w, 1 - args.strength["ema"]) for mean, w in zip(state["average"], W)]
    )  # with the last step's weights


def safelora(model, W, batch, contrast, args, state):
    """SFT; Safe LoRA (arXiv 2405.16833) when it is done."""
    if "W_start" not in state:
        state["W_start"] = copies(W)
    return task_step(model, W, batch)


@torch.no_grad()
def end_safelora(model, W, args, state, before):
    """Each projection matrix's ΔW (embeddings and head are left) is projected onto what safety training wrote, where less of it lies
    there than a cosine of --strength: onto the left singular vectors that hold 90 % of the aligned model − `before`. A variant: Safe
    LoRA's own matrix, V Vᵀ / ‖V‖, is no projection (twice is not once), and its cosines are others."""
    old = dict(before.named_parameters())
    for name, left, right, aligned, keep in changes(model, W, state["W_start"]):
        U = leading_directions(widen(aligned) - widen(old[name]).to(aligned.device), WRITTEN)
        inside = U @ (U.T @ left)
        if inner(unit([inside @ right]), unit([left @ right])) < args.strength["safelora"]:
            keep(inside)


def changes(model, W, W_start):
    """(name, left, right, aligned, keep) of every trained matrix: ΔW = left @ right up to its scale, its weights at the start, and
    what puts another `left` into the model."""
    for name, _, _, layer in lora_layers(model):
        yield f"{name}.weight", layer.lora_B, layer.lora_A, layer.weight, layer.lora_B.copy_
    if not lora_layers(model):
        for (name, w), start in zip(model.named_parameters(), W_start):
            if name.endswith("proj.weight"):
                one = torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
                yield (
                    name,
                    w - start,
                    one,
                    start,
                    lambda left, w=w, start=start: w.copy_(start + left),
                )


# Each process would compute all of these: what they look at is not the loss of rows.
UNSPLIT = ("kl", "steer", "steer_project", "vaccine")
STAGES = {"vaccine": vaccine, "booster": booster}
ENDINGS = {"ema": end_ema, "safelora": end_safelora}
RIVALS = {
    "mix": mix,
    "sam": sam,
    "lisa": lisa,
    "kl": kl,
    "constrained": constrained,
    "penalty": penalty,
    "steer": steer,
    "steer_project": steer_project,
    **STAGES,
    "ema": ema,
    "safelora": safelora,
}
