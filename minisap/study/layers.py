"""Per layer: can unsafe prompts be told from safe ones, do task and safety pull against each other, and what would SAP's probe do
there; and whether the direction of that probe survives in half precision. (For probe.py, whose arguments `args` are.)
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from minisap.checkpoint import DTYPES, load_model
from minisap.data import (
    batch_rows,
    collate,
    collate_pairs,
    encode_pairs,
    encode_prompt,
    encode_rows,
)
from minisap.lora import add_lora, lora_layers
from minisap.measure.stats import auroc, wilson
from minisap.sap import (
    fit_probe,
    gradient,
    harmful_direction,
    inner,
    median_norm,
    probe_gradient,
    unit,
    useful_loss,
)


@torch.no_grad()
def last_token_states(model, tokenizer, prompts):
    """Hidden states at the last prompt token after every layer: (layers, prompts, D), float32."""
    states = []
    for prompt in prompts:
        hidden = []
        model.model(
            torch.tensor([encode_prompt(tokenizer, prompt)], device=model.lm_head.weight.device),
            hidden=hidden,
        )
        states.append(torch.stack([x[0, -1] for x in hidden]))
    return torch.stack(states, dim=1).to("cpu", torch.float32)


def linear_probe(train_x, train_y, test_x, test_y, l2=1e-2):
    """Logistic regression on standardised states: {"accuracy", its interval, "auroc", "n"} on the held-out prompts."""
    mean, std = train_x.mean(0), train_x.std(0) + 1e-6
    train_x, test_x = (train_x - mean) / std, (test_x - mean) / std
    w, b = torch.zeros(train_x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = bce(train_x @ w + b, train_y) + l2 * w.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = (test_x @ w + b).detach()
    right = int(((scores > 0) == (test_y > 0.5)).sum())
    low, high = wilson(right, len(test_y))
    area = auroc(scores[test_y > 0.5], scores[test_y < 0.5])
    return {
        "accuracy": right / len(test_y),
        "ci_low": low,
        "ci_high": high,
        "auroc": area,
        "n": len(test_y),
    }


def linear_probes(model, tokenizer, unsafe, safe):
    """One linear probe per layer. The first half of each kind trains, the second tests (both come shuffled)."""
    n = min(len(unsafe), len(safe))
    if n < 4:
        raise ValueError(
            f"linear probes need 4 unsafe and 4 safe prompts; there are {len(unsafe)} and {len(safe)}"
        )
    x = torch.cat(
        [last_token_states(model, tokenizer, prompts[:n]) for prompts in (unsafe, safe)], dim=1
    )
    y = torch.cat([torch.ones(n), torch.zeros(n)])
    train = torch.arange(2 * n) % n < n // 2
    return [linear_probe(layer[train], y[train], layer[~train], y[~train]) for layer in x]


def gradients(args, model, splits, tokenizer):
    """Per layer, means over batches:
    task_cosine   cos(∇_W L_useful, ∇_W L_safe) over the layer's weights; below 0: task steps lead to harm
    probe_cosine  cos(∇_V L_su, ∇_V L_useful); below 0: the paper's probe lowers the task loss by itself
    gap_norm      ‖∇_V L_su‖
    effect        how far a probe of the layer's own norm moves ⟨∇_W L_useful, ĝ⟩, to first order"""
    rows, pairs = (
        encode_rows(tokenizer, splits["task"], args.max_len),
        encode_pairs(tokenizer, splits["pairs"], args.max_len),
    )
    W = add_lora(model, targets=args.lora_targets, seed=args.seed)
    place = [int(name.split(".")[2]) for name, *_ in lora_layers(model) for _ in "AB"]
    layers, measured = range(model.config.n_layers), []
    for step in range(args.batches):
        batch = collate(batch_rows(rows, args.batch_size, step, args.seed), device=args.device)
        contrast = collate_pairs(
            batch_rows(pairs, args.pairs_per_step, step, args.seed), args.device
        )
        g_hat, hidden = harmful_direction(model, W, contrast), []
        g_W = gradient(useful_loss(model, batch), W)
        d, g_V = probe_gradient(model, W, g_hat, batch, layers, hidden)
        of = lambda tensors, j: unit([t for t, p in zip(tensors, place) if p == j])
        task = [inner(of(g_W, j), of(g_hat, j)).item() for j in layers]
        probe = [F.cosine_similarity(d[j], g_V[j], dim=0).item() for j in layers]
        gap = [d[j].norm().item() for j in layers]
        effect = [gap[j] * median_norm(hidden[j], batch).item() for j in layers]
        measured.append([task, probe, gap, effect])
    return [
        dict(zip(("task_cosine", "probe_cosine", "gap_norm", "effect"), row))
        for row in np.mean(measured, axis=0).T.tolist()
    ]


def recommend(effects):
    """The run of a third of the layers with the largest mean effect, as train.py --layers takes it."""
    width = max(1, len(effects) // 3)
    first = max(range(len(effects) - width + 1), key=lambda j: sum(effects[j : j + width]))
    return f"{first}-{first + width - 1}"


def turn(model, W, batch, V):
    """How far a probe turns the task's gradient, ∇_W L_useful(W, V) − ∇_W L_useful(W, 0): one vector, float64."""
    there, here = (gradient(useful_loss(model, batch, v), W) for v in (V, None))
    return torch.cat([(a.double() - b.double()).flatten() for a, b in zip(there, here)])


def precision(args, splits, tokenizer):
    """Of the probe that is fitted to one batch: [{dtype, direction, mean and lowest cosine over the layers with the one that is
    exact in float64}], and in each dtype the turn of the gradient by the float64 probe: is a small one lost in rounding?"""
    batch = collate(
        encode_rows(tokenizer, splits["task"][: args.batch_size], args.max_len), device=args.device
    )
    pairs = encode_pairs(tokenizer, splits["pairs"], args.max_len)
    contrast = collate_pairs(batch_rows(pairs, args.pairs_per_step, 0, args.seed), args.device)
    reference, rows = {}, []
    for name in ("float64", "float32", "bfloat16"):
        model = load_model(args.model, DTYPES[name], args.device)
        W, layers = (
            add_lora(model, targets=args.lora_targets, seed=args.seed),
            range(model.config.n_layers),
        )
        g_hat = harmful_direction(model, W, contrast)
        for epsilon in (0, 2e-5, 1e-3, 1e-1):
            V = fit_probe(model, W, g_hat, batch, layers, args.radius, epsilon=epsilon)
            reference = reference or {"V": V, "turn": turn(model, W, batch, V)}
            cosines = [
                F.cosine_similarity(V[j].double(), reference["V"][j], dim=0).item() for j in layers
            ]
            rows.append(
                {
                    "dtype": name,
                    "direction": f"difference, epsilon {epsilon:g}" if epsilon else "exact",
                    "mean_cosine": float(np.mean(cosines)),
                    "lowest_cosine": min(cosines),
                }
            )
            print(
                "{dtype:9} {direction:26} mean cosine {mean_cosine:.4f}, lowest {lowest_cosine:.4f}".format(
                    **rows[-1]
                ),
                flush=True,
            )
        turned = turn(model, W, batch, reference["V"])
        rows.append(
            {
                "dtype": name,
                "direction": "turn of the gradient",
                "size": (turned.norm() / reference["turn"].norm()).item(),
                "cosine": F.cosine_similarity(turned, reference["turn"], dim=0).item(),
            }
        )
        print(
            "{dtype:9} {direction:26} cosine {cosine:.4f}, size {size:.4f} of float64's".format(
                **rows[-1]
            ),
            flush=True,
        )
        del model, W, g_hat, V  # before the next is loaded
    return rows
