"""Safety-Aware Probing (arXiv 2505.16737): Algorithm 1, line by line; and, the default, what its lines come to for a probe on the rows.

W      the trained weights, a list of tensors (LoRA's, or all)
V      the probe.
       "states" (the paper's, for one step): {layer: v_j}, x_j = layer_j(x_{j-1}) + v_j, v_j of shape (D,)
       "rows" (ours, the default): (N,), 1 for the rows of the task that count, 0 for those that lead to harm: a filter
ĝ      g_hat, one tensor per W, unit norm over all of them: the direction in which the model becomes *less* safe
Signs  L_safe falls as the model becomes safer.  ⟨∇_W L_useful, ĝ⟩ < 0: a descent step on the task is a step toward harm.
"""

from contextlib import contextmanager

import torch
from torch.autograd.forward_ad import make_dual
from tqdm import tqdm

from minisap.data import collate, collate_pairs, sources
from minisap.losses import response_nll, token_nll
from minisap.model import widen
from minisap.support import distributed as parallel
from minisap.support.errors import check_finite
from minisap.tangents import derivative_along


def useful_loss(model, batch, probe=None, hidden=None):
    """L_useful(W, V): mean cross-entropy of the batch's labelled tokens, nats per token."""
    nats, tokens = response_nll(model, batch, probe, hidden)
    return nats.sum() / tokens.sum()


def answer_nll(model, both):
    """(nats, tokens), both (B, 2): as response_nll, of each pair's safe and harmful answer, which come by turns (collate_pairs)."""
    return tuple(x.view(-1, 2) for x in response_nll(model, both))


def safety_loss(model, contrast):
    """L_safe(W): mean over prompts of nll(safe answer) − nll(harmful answer), each in nats per token (the paper's v1)."""
    nats, tokens = answer_nll(model, contrast["both"])
    safe, harmful = (nats / tokens).T
    return (safe - harmful).mean()


def gradient(loss, W):
    """∇_W loss, of the rows of all processes."""
    return parallel.summed(torch.autograd.grad(loss, W))


def inner(a, b):
    """⟨a, b⟩ over lists of tensors, in float32 or wider."""
    return sum((widen(x) * widen(y)).sum() for x, y in zip(a, b))


def unit(tensors):
    """The list scaled to unit norm over all its tensors, in float32 or wider; zeros stay zeros."""
    norm = inner(tensors, tensors).sqrt()
    return [widen(t) / norm if norm > 0 else widen(t) for t in tensors]


def harmful_direction(model, W, contrast):
    """ĝ = ∇_W L_safe / ‖∇_W L_safe‖."""
    return unit(gradient(safety_loss(model, contrast), W))


@torch.no_grad()
def put(W, values):
    """Copy `values` into W, in place and bit for bit."""
    for w, value in zip(W, values):
        w.copy_(value)


def copies(W):
    return [w.detach().clone() for w in W]


@contextmanager
def weights_at(W, values):
    """Within: W holds `values`. After: what it held, bit for bit (from a copy: W + d − d is not W)."""
    here = copies(W)
    put(W, values)
    try:
        yield
    finally:
        put(W, here)


def zero_probe(model, layers):
    """V = 0, {layer: (D,)}, in float32 or wider, ready to be differentiated."""
    zero = widen(model.lm_head.weight.new_zeros(model.config.hidden_size))
    return {j: zero.clone().requires_grad_() for j in layers}


def probe_gradient(model, W, g_hat, batch, layers, hidden=None):
    """(∇_V L_su, ∇_V L_useful) at V = 0 of a probe on states, each {layer: (D,)}. The first is line 4 as ε → 0, exactly:
    ∇_V ⟨∇_W L_useful(W, V), ĝ⟩, the gradient of a derivative along ĝ. No ε, and no subtraction of nearly equal numbers, so that it survives bfloat16.
    If V moved, too, by t · V̇, that derivative would be ⟨∇_V L_useful, V̇⟩ more: the second is its gradient by V̇, at V̇ = 0."""
    V, V_dot = zero_probe(model, layers), zero_probe(model, layers)
    L_useful = lambda model: useful_loss(
        model, batch, {j: make_dual(V[j], V_dot[j]) for j in layers}, hidden
    )
    d = gradient(derivative_along(model, W, g_hat, L_useful), [*V.values(), *V_dot.values()])
    return dict(zip(V, d)), dict(zip(V, d[len(V) :]))


def probe_gradient_by_difference(model, W, g_hat, batch, layers, epsilon, hidden=None):
    """The same, with line 4 as it is written: ∇_V L_useful(W + ΔW_harmful, 0) − ∇_V L_useful(W, 0), ΔW_harmful = ε ‖W‖ ĝ."""
    V = zero_probe(model, layers)
    gradient_V = lambda hidden: gradient(useful_loss(model, batch, V, hidden), list(V.values()))
    here = gradient_V([] if hidden is None else hidden)
    with torch.no_grad():
        scale = epsilon * inner(W, W).sqrt()
        moved = [(w + scale * g).to(w.dtype) for w, g in zip(W, g_hat)]
    with weights_at(W, moved):
        there = gradient_V([])  # of the same tokens in the same order, so that rounding cancels
    return {j: b - a for j, a, b in zip(V, here, there)}, dict(zip(V, here))


def fit_probe(model, W, g_hat, batch, layers, radius, epsilon=0.0, log=None):
    """Lines 3 to 5 for states: V_safe = {j: radius · h_j · d_j / ‖d_j‖}, with d = ∇_V L_su from the exact derivative, or by
    difference where ε > 0, and h_j the median norm of layer j's hidden states over the batch's tokens. `radius` is thus a share
    of the hidden state, and takes the place of the paper's β. Into `log` goes the cosine of d_j and ∇_V L_useful, mean over
    layers, as probe_cosine: below 0, the probe lowers the task loss, so that W need not learn what is missed when it is gone."""
    if radius == 0 or not layers:
        return {}
    hidden = []
    if epsilon:
        d, g_V = probe_gradient_by_difference(model, W, g_hat, batch, layers, epsilon, hidden)
    else:
        d, g_V = probe_gradient(model, W, g_hat, batch, layers, hidden)
    if log is not None:
        log["probe_cosine"] = sum(
            (unit([d[j]])[0] @ unit([g_V[j]])[0]).item() for j in layers
        ) / len(layers)
    return {j: radius * median_norm(hidden[j], batch) * unit([d[j]])[0] for j in layers}


@torch.no_grad()
def row_slopes(model, W, direction, batch, min_tokens):
    """(B,), nats per token: how steeply the loss of each row's answer falls along the direction, at the steepest of its beginnings, or 0 where none falls:
    min over t of ⟨∇_W ℓ_t, direction⟩ / max(t, min_tokens), where ℓ_t are the nats of the answer's first t tokens. Exact, at the cost of about two forward
    passes with LoRA, of three with all weights."""
    labelled = batch["labels"][:, 1:] != -100
    slopes = derivative_along(
        model, W, direction, lambda model: token_nll(model, batch)[0]
    )  # of each token
    slopes = slopes.new_zeros(labelled.shape).masked_scatter(labelled, slopes)
    rates = slopes.cumsum(1) / labelled.cumsum(1).clamp(
        min=min_tokens
    )  # (B, T - 1), of every beginning
    return (
        rates.amin(1).clamp(max=0).where(rates[:, -1].isfinite(), torch.nan)
    )  # amin passes over +inf: NaN, for slopes_of to see


def by_length(examples, batch_size):
    """Places of examples, batch by batch, those of like length together."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def slopes_of(model, W, direction, examples, min_tokens, batch_size):
    """(N,): row_slopes of many examples, those of like length together; NotFinite names one without a number."""
    slopes = torch.zeros(len(examples))
    for chosen in tqdm(
        by_length(examples, batch_size), desc="slopes", leave=False, disable=not parallel.leads()
    ):
        slopes[chosen] = row_slopes(
            model,
            W,
            direction,
            collate([examples[i] for i in chosen], device=W[0].device),
            min_tokens,
        ).to(slopes)
    for example, slope in zip(examples, slopes.tolist()):
        check_finite({f"the slope of {sources([example])}": slope})
    return slopes


def safety_gradient(model, W, pairs, batch_size):
    """∇_W L_safe over many pairs, [(safe example, harmful example)], a batch of them at a time."""
    total = [torch.zeros_like(w) for w in W]
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        L_safe = safety_loss(model, collate_pairs(chosen, W[0].device))
        g_safe = gradient(L_safe, W)
        check_finite({f"safety_loss of {sources(safe for safe, _ in chosen)}": L_safe.item()})
        total = [t + len(chosen) / len(pairs) * g for t, g in zip(total, g_safe)]
    return total


def mean_harmful_tokens(pairs):
    """How many tokens the harmful answers of [(safe example, harmful example)] have in the mean, their end included."""
    return sum(label != -100 for _, harmful in pairs for label in harmful["labels"]) / len(pairs)


def fit_rows(model, W, g_safe, examples, gate, min_tokens, batch_size):
    """(N,) bool, True where a row is trained on: where no beginning of its answer falls along ĝ by more than gate · ‖∇L_safe‖, nats per token (row_slopes).
    Lines 2 to 5 for Σ_i V_i ℓ_i, V_i the weight of row i's loss ℓ_i: L_su is Σ_i V_i ⟨∇_W ℓ_i, ĝ⟩ then, and ascent under 0 ≤ V ≤ 1 ends at 0 where that
    slope is below 0, at 1 elsewhere. Beyond the paper: beginnings (harm shows where an answer begins, whatever follows), the threshold, and that a beginning
    of fewer than min_tokens counts as so many (a word or two say little). W are the weights that a run begins with, and all is asked once: a model that has
    come to refuse safe prompts takes their answers for harm, leaves them out, and unlearns them for good."""
    slopes, steepness = (
        slopes_of(model, W, unit(g_safe), examples, min_tokens, batch_size),
        inner(g_safe, g_safe).sqrt().item(),
    )
    check_finite({"the norm of ∇L_safe": steepness})
    return slopes >= -gate * steepness


def median_norm(x, batch):
    """Median norm of hidden states x (B, T, D) over the tokens that carry a label (so no padding, and no outlier at the start)."""
    labelled = batch["labels"] != -100
    norms = widen(x.detach()[labelled[parallel.mine(len(labelled))]]).norm(dim=-1)
    return parallel.gathered(norms, labelled).median()


def project_out_harm(grads, g_hat):
    """Remove from a gradient the component whose descent would lead toward harm; without conflict it stays as it is."""
    conflict = inner(grads, g_hat)
    return (
        [(g - conflict * h).to(g.dtype) for g, h in zip(grads, g_hat)]
        if conflict < 0
        else list(grads)
    )


def paper_step(
    model, W, batch, contrast, state, layers, radius, epsilon=0.0, projection=False, refresh=1
):
    """(gradient, log) of one step of Algorithm 1 with the paper's probe, for an optimizer to follow (line 7), and, if so, the projection
    after it. contrast: see collate_pairs. state and refresh: as in sap_step, of ĝ and V_safe. At radius 0 and without projection SFT, bit for bit."""
    log = {}
    if state["step"] % refresh and "probe" in state:
        g_hat, V_safe = state["probe"]
    else:
        g_hat = harmful_direction(model, W, contrast)  # line 2
        V_safe = fit_probe(model, W, g_hat, batch, layers, radius, epsilon, log)  # lines 3, 4, 5
        state |= {"probe": (g_hat, V_safe)} if refresh > 1 else {}
    loss = useful_loss(model, batch, V_safe)
    g_W = gradient(loss, W)  # line 6
    log |= {"loss": loss.item(), "conflict": inner(g_W, g_hat).item()}
    return project_out_harm(g_W, g_hat) if projection else g_W, log


def sap_step(
    model,
    W,
    batch,
    contrast,
    state,
    projection=False,
    safety_weight=0.0,
    refusal_weight=0.0,
    refresh=1,
):
    """(gradient, log) of one step with the probe on the rows: the batch holds those alone that are kept (fit_rows; train.py drops the others),
    maybe none. Then the projection, then the safety loss's own gradient, and that of the refusals' cross-entropy; without all of these SFT,
    bit for bit.
    state: {"step": the number of this one} and what is kept between steps.  refresh: ∇_W L_safe, and so ĝ, is that of the last step
    whose number is a multiple of it."""
    log = {}
    if state["step"] % refresh and "g_safe" in state:
        g_safe = state["g_safe"]
    else:
        L_safe = safety_loss(model, contrast)
        g_safe, log["safety_loss"] = gradient(L_safe, W), L_safe.item()
        state |= {"g_safe": g_safe} if refresh > 1 else {}
    g_hat, g_W = unit(g_safe), [torch.zeros_like(w) for w in W]  # line 2
    if len(batch["labels"]):
        loss = useful_loss(model, batch)
        g_W, log["loss"] = gradient(loss, W), loss.item()  # line 6
    log["conflict"] = inner(g_W, g_hat).item()
    g_W = project_out_harm(g_W, g_hat) if projection else g_W
    if safety_weight:
        g_W = [g + safety_weight * s for g, s in zip(g_W, g_safe)]
    if refusal_weight:
        refusals = useful_loss(model, contrast["safe"])
        g_W, log["refusal_loss"] = (
            [g + refusal_weight * r for g, r in zip(g_W, gradient(refusals, W))],
            refusals.item(),
        )
    return g_W, log
