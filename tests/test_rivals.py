"""Every rival against its identity (its knob at 0 is SFT, or mix, bit for bit), and against its paper's formula by other means."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from test_sap import ARGS, LAYERS, example, gradient, moved, world  # noqa: F401 (a fixture)
from tiny import BASE, tiny_model

from minisap.baselines import ENDINGS, RIVALS, STAGES, STRENGTH
from minisap.data import collate
from minisap.lora import lora_layers
from minisap.losses import response_nll, token_nll
from minisap.methods import METHODS
from minisap.sap import put, safety_loss, unit, useful_loss
from minisap.study.mechanism import leading_directions


def args_with(**strength):
    return Namespace(**vars(ARGS) | {"strength": STRENGTH | strength})


def random_direction(W, size):
    generator = torch.Generator().manual_seed(5)
    return [size * torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in W]


@torch.no_grad()
def move(W, shift):
    for w, s in zip(W, shift):
        w += s


@pytest.mark.parametrize("method", RIVALS)
def test_a_knob_at_0_is_sft_bit_for_bit_and_W_stays(method, world):  # noqa: F811
    """(vaccine's probe is each token's own, so that what rows have in common is computed for each: mix, to rounding.)"""
    model, W, batch, pairs = world
    args, state, saved = args_with(**{method: 0.0}), {"step": 0}, [w.detach().clone() for w in W]
    RIVALS[method](model, W, batch, pairs, args, state)  # at the start
    move(W, random_direction(W, 0.01))
    saved, state["step"] = [w.detach().clone() for w in W], 1
    found, log = RIVALS[method](model, W, batch, pairs, args, state)
    limit = "mix" if method in STAGES else "project" if method == "steer_project" else "sft"
    expected, _ = METHODS[limit](model, W, batch, pairs, args, {"step": 0})
    same = torch.allclose if method == "vaccine" else torch.equal
    assert all(same(a, b) for a, b in zip(found, expected)) and log["loss"] > 0
    if method in ENDINGS:
        ENDINGS[method](model, W, args, state, tiny_model(BASE | {"num_hidden_layers": 3}, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(W, saved))


def test_sam_is_the_gradient_at_the_worst_weights_nearby(world):  # noqa: F811
    model, W, batch, pairs = world
    g = gradient(model, W, batch)
    norm = torch.sqrt(sum((x**2).sum() for x in g))
    expected = moved(W, g, 0.05 / norm, torch.enable_grad()(lambda: gradient(model, W, batch)))
    for a, b in zip(RIVALS["sam"](model, W, batch, pairs, args_with(), {"step": 0})[0], expected):
        torch.testing.assert_close(a, b)


def test_lisa_takes_turns_and_is_drawn_to_where_the_other_left_off(world):  # noqa: F811
    model, W, batch, pairs = world
    state, anchors = {}, {}
    for step in range(12):
        if step in (0, 9, 10):  # task, safe answers, task
            anchors["now"] = [w.detach().clone() for w in W]
        state["step"], rows = step, pairs["safe"] if step == 9 else batch
        found, _ = RIVALS["lisa"](model, W, batch, pairs, args_with(lisa=0.3), state)
        drawn = useful_loss(model, rows) + 0.15 * sum(
            ((w - a) ** 2).sum() for w, a in zip(W, anchors["now"])
        )
        for a, b in zip(found, torch.autograd.grad(drawn, W)):
            torch.testing.assert_close(a, b)
        move(W, random_direction(W, 0.01))


def test_kl_is_the_divergence_from_the_start_on_safe_answers(world):  # noqa: F811
    model, W, batch, pairs = world
    state, direction = {"step": 0}, random_direction(W, 0.05)
    answers = pairs["safe"]["labels"][:, 1:] != -100
    log_p = lambda: torch.log_softmax(model(pairs["safe"]["input_ids"])[:, :-1][answers], dim=-1)
    start = log_p().detach()
    RIVALS["kl"](model, W, batch, pairs, args_with(), state)
    move(W, direction)
    found, log = RIVALS["kl"](model, W, batch, pairs, args_with(kl=2.0), state)
    away = (start.exp() * (start - log_p())).sum(-1).mean()
    assert log["kl"] == pytest.approx(away.item()) and away > 1e-4
    for a, b in zip(found, torch.autograd.grad(useful_loss(model, batch) + 2 * away, W)):
        torch.testing.assert_close(a, b)


def test_constrained_is_the_gradient_of_its_published_loss(world):  # noqa: F811
    model, W, _, pairs = world
    state, batch = {"step": 0}, collate([example(i, n=8 + 2 * i) for i in range(4)])
    start, rows, places = (x.detach() for x in token_nll(model, batch))
    RIVALS["constrained"](model, W, batch, pairs, args_with(), state)
    move(W, random_direction(W, 0.05))
    found, _ = RIVALS["constrained"](model, W, batch, pairs, args_with(), state)
    beta = torch.tensor(
        [[0.5, 2, 2, 2, 2, 0.1][min(int(place) - 4, 5)] for place in places], dtype=torch.float64
    )  # prompts have 4 tokens
    assert len(set(beta.tolist())) == 3
    loss = -(2 / beta * F.logsigmoid(beta * (start - token_nll(model, batch)[0]))).mean()
    for a, b in zip(found, torch.autograd.grad(loss, W)):
        torch.testing.assert_close(a, b)


def test_penalty_is_the_gradient_of_the_sum(world):  # noqa: F811
    model, W, batch, pairs = world
    expected = torch.autograd.grad(useful_loss(model, batch) + 0.3 * safety_loss(model, pairs), W)
    for a, b in zip(
        RIVALS["penalty"](model, W, batch, pairs, args_with(penalty=0.3), {"step": 0})[0], expected
    ):
        torch.testing.assert_close(a, b)


def test_steer_is_the_gradient_at_a_constant_probe_from_safe_to_harmful(world):  # noqa: F811
    model, W, batch, pairs = world
    state, args, V = {"step": 0}, args_with(steer=0.1), {}
    for j in LAYERS:
        states = {}
        for key, rows in pairs.items():
            hidden = []
            model.model(rows["input_ids"], hidden=hidden)
            states[key] = hidden[j].detach()[rows["labels"] != -100]
        away = states["harmful"].mean(0) - states["safe"].mean(0)
        V[j] = 0.1 * states["harmful"].norm(dim=-1).median() * away / away.norm()
    for _ in range(2):  # the same probe after W has moved
        for a, b in zip(
            RIVALS["steer"](model, W, batch, pairs, args, state)[0], gradient(model, W, batch, V)
        ):
            torch.testing.assert_close(a, b)
        move(W, random_direction(W, 0.05))


def test_vaccine_s_perturbation_raises_the_loss_as_its_norm_says(world):  # noqa: F811
    model, W, batch, pairs = world
    values = [
        RIVALS["vaccine"](model, W, batch, pairs, args_with(vaccine=rho), {"step": 0})[1]["loss"]
        for rho in (0.0, 1e-4, 2e-4)
    ]
    hidden = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, x: hidden.append(x))
        for layer in model.model.layers
    ]
    nats = sum(
        F.cross_entropy(
            model(rows["input_ids"])[:, :-1].flatten(0, 1),
            rows["labels"][:, 1:].flatten(),
            reduction="sum",
        )
        for rows in (batch, pairs["safe"])
    )
    tokens = sum((rows["labels"] != -100).sum() for rows in (batch, pairs["safe"]))
    steepest = torch.sqrt(sum((g**2).sum() for g in torch.autograd.grad(nats / tokens, hidden)))
    for handle in handles:
        handle.remove()
    assert (values[1] - values[0]) / 1e-4 == pytest.approx(steepest.item(), rel=1e-3)
    assert (values[2] - values[0]) / 2e-4 == pytest.approx(steepest.item(), rel=1e-3)


def test_booster_subtracts_what_a_harmful_step_would_gain(world):  # noqa: F811
    model, W, batch, pairs = world
    nats_per_token = lambda: (
        sum((n / t for n, t in zip(*response_nll(model, pairs["harmful"]))))
        / len(pairs["harmful"]["labels"])
    )
    harm = torch.enable_grad()(lambda: torch.autograd.grad(nats_per_token(), W))
    here = harm()
    there = moved(W, unit(here), -0.1, harm)
    plain, _ = METHODS["mix"](model, W, batch, pairs, ARGS, {"step": 0})
    found, _ = RIVALS["booster"](model, W, batch, pairs, args_with(booster=2.0), {"step": 0})
    for f, p, a, b in zip(found, plain, here, there):
        torch.testing.assert_close(f, p + 2 * (a - b))


def test_ema_ends_with_the_moving_average_of_its_weights(world):  # noqa: F811
    model, W, batch, pairs = world
    args, state, mean = args_with(ema=0.7), {"step": 0}, [w.detach().clone() for w in W]
    for _ in range(4):
        RIVALS["ema"](model, W, batch, pairs, args, state)
        move(W, random_direction(W, 0.1))
        mean = [0.7 * m + 0.3 * w.detach() for m, w in zip(mean, W)]
    ENDINGS["ema"](model, W, args, state, None)
    for a, b in zip(W, mean):
        torch.testing.assert_close(a.detach(), b)


def test_safelora_projects_what_strays_from_safety_training_once_and_for_all(world):  # noqa: F811
    model, W, batch, pairs = world
    before, args, state = (
        tiny_model(BASE | {"num_hidden_layers": 3}, seed=9),
        args_with(safelora=2.0),
        {"step": 0},
    )
    name = "model.layers.1.self_attn.q_proj"
    lora = {n: layer for n, _, _, layer in lora_layers(model)}
    weight = lambda: (
        model.get_parameter(f"{name}.weight").detach()
        + (lora[name].scale * (lora[name].lora_B @ lora[name].lora_A).detach() if lora else 0)
    )
    aligned = model.get_parameter(f"{name}.weight").detach().clone()
    if lora:
        put(W, [w * (i % 2 == 0) for i, w in enumerate(W)])  # LoRA starts with B = 0
    RIVALS["safelora"](model, W, batch, pairs, args, state)
    move(W, random_direction(W, 0.1))
    strayed = weight() - aligned
    ENDINGS["safelora"](model, W, args_with(safelora=0.01), state, before)
    torch.testing.assert_close(weight() - aligned, strayed)  # near enough: as it was
    ENDINGS["safelora"](model, W, args, state, before)  # a cosine of 2: all is projected
    once = weight() - aligned
    U = leading_directions(aligned - before.get_parameter(f"{name}.weight").detach(), 0.9)
    torch.testing.assert_close(once, U @ U.T @ strayed)
    assert 0 < U.shape[1] < 32 and once.norm() < 0.99 * strayed.norm()
    ENDINGS["safelora"](model, W, args, state, before)
    torch.testing.assert_close(weight() - aligned, once)
