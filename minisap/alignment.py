"""Alignment: the three safety fine-tuning protocols of arXiv 2407.10264 and the pre-training that comes before them in the world,
behind the signature of methods.py. To learn to refuse what is unsafe *and* to answer what is safe:

             preferred y_p           dispreferred y_l
task rows    batch                   contrast["refused"]     the task's own answers, and refusals of the same prompts
unsafe       contrast["safe"]        contrast["harmful"]

ℓ is the mean cross-entropy per token of an answer."""

import math

import torch
import torch.nn.functional as F

from minisap.losses import response_nll, token_nll
from minisap.sap import copies, gradient, weights_at

UNLEARN_GAMMA = 0.1  # the paper's, at its larger learning rate
DPO_BETA, DPO_GAMMA = 0.1, 0.01


def answer_loss(model, *batches):
    """ℓ of every row of the batches: (rows,)."""
    return torch.cat(
        [nats / tokens for nats, tokens in (response_nll(model, batch) for batch in batches)]
    )


@torch.no_grad()
def at_start(W, state, value):
    """value() by the weights that the run began with; W as it was then is kept in `state`."""
    if "W_start" not in state:
        state["W_start"] = copies(W)
    with weights_at(W, state["W_start"]):
        return value()


def preferred(model, batch, contrast):
    return answer_loss(model, batch, contrast["safe"])


def dispreferred(model, batch, contrast):
    return answer_loss(model, contrast["refused"], contrast["harmful"])


def ssft(model, W, batch, contrast, args, state):
    """Supervised safety fine-tuning: E ℓ(y_p)."""
    loss = preferred(model, batch, contrast).mean()
    return gradient(loss, W), {"loss": loss.item()}


def unlearn(model, W, batch, contrast, args, state):
    """E ℓ(y_p) − γ ℓ(y_l)."""
    loss = (
        preferred(model, batch, contrast).mean()
        - UNLEARN_GAMMA * dispreferred(model, batch, contrast).mean()
    )
    return gradient(loss, W), {"loss": loss.item()}


def dpo(model, W, batch, contrast, args, state):
    """−E log σ(β (ℓ_0(y_p) − ℓ(y_p)) − γ (ℓ_0(y_l) − ℓ(y_l))), ℓ_0 by the model that the run began with."""
    both = lambda: (preferred(model, batch, contrast), dispreferred(model, batch, contrast))
    (p_0, l_0), (p, l) = at_start(W, state, both), both()
    loss = -F.logsigmoid(DPO_BETA * (p_0 - p) - DPO_GAMMA * (l_0 - l)).mean()
    return gradient(loss, W), {"loss": loss.item()}


def pretrain(model, W, batch, contrast, args, state):
    """Cross-entropy of the answer, and of the prompt with a weight that falls from 1 to 0, by a cosine, in the first half of the
    steps: a language model first."""
    seen = (
        batch["labels"].ne(-100).flip(1).cumsum(1).flip(1) > 0
    )  # up to the last label: no padding
    nll, rows, places = token_nll(
        model, batch | {"labels": torch.where(seen, batch["input_ids"], -100)}
    )
    answer = batch["labels"][rows, places] != -100
    weight = (1 + math.cos(math.pi * min(1, 2 * state["step"] / args.steps))) / 2
    loss = nll[answer].mean() + weight * nll[~answer].mean()
    return gradient(loss, W), {"loss": loss.item()}


ALIGN = {"ssft": ssft, "dpo": dpo, "unlearn": unlearn}
