"""The method against calculus, in float64, and against its limit cases."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from tiny import BASE, beginnings, slope_by_hand, tiny_model

from minisap import losses as likelihood
from minisap import sap
from minisap.alignment import ALIGN
from minisap.baselines import STRENGTH
from minisap.checkpoint import load_model
from minisap.data import batch_rows, collate, collate_pairs, encode_pairs, encode_rows
from minisap.lora import add_lora
from minisap.losses import response_nll
from minisap.methods import FILTERS, METHODS, released
from minisap.sap import (
    fit_probe,
    harmful_direction,
    inner,
    median_norm,
    paper_step,
    probe_gradient,
    probe_gradient_by_difference,
    project_out_harm,
    safety_loss,
    sap_step,
    unit,
    useful_loss,
)
from minisap.support.errors import NotFinite
from minisap.tangents import derivative_along
from minisap.tokenizer import Tokenizer

LAYERS = [0, 1]


def example(seed, prompt_seed=None, n=9):
    ids = torch.randint(0, 96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    if prompt_seed is not None:
        ids[:4] = example(prompt_seed)["input_ids"][:4]
    return {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}


@pytest.fixture(params=["lora", "all weights"])
def world(request):
    """(model, W, batch, pairs): a tiny float64 model with LoRA branches that are not zero, or with all weights trained."""
    model = tiny_model(BASE | {"num_hidden_layers": 3})
    if request.param == "lora":
        W = add_lora(model, r=4, alpha=8)
        for i, w in enumerate(W):
            torch.nn.init.normal_(w, std=0.1, generator=torch.Generator().manual_seed(i))
    else:
        W = list(model.parameters())
    batch = collate([example(i, i // 2, n=6 + i) for i in range(4)])  # of two prompts
    return model, W, batch, collate_pairs(PAIRS)


PAIRS = [(example(20 + i, 10 + i), example(30 + i, 10 + i, n=7 + i)) for i in range(3)]
FLIPPED = collate_pairs([(harmful, safe) for safe, harmful in PAIRS])


def g_hat_of(world):
    model, W, _, pairs = world
    return harmful_direction(model, W, pairs)


def gradient(model, W, batch, V=None):
    return torch.autograd.grad(useful_loss(model, batch, V), W)


def moved(W, direction, step, value):
    """value() with W moved by step · direction."""
    with torch.no_grad():
        for w, d in zip(W, direction):
            w += step * d
        result = value()
        for w, d in zip(W, direction):
            w -= step * d
    return result


def test_useful_loss_is_cross_entropy_of_shifted_labels(world):
    model, _, batch, _ = world
    logits = model(batch["input_ids"])
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(useful_loss(model, batch), expected)


def test_safety_loss_is_the_mean_difference_of_per_token_nll(world):
    model, _, _, pairs = world

    def nll(batch, row):
        ids, labels = batch["input_ids"][row : row + 1], batch["labels"][row]
        logp = torch.log_softmax(model(ids), dim=-1)[0]
        return -torch.stack(
            [logp[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
        ).mean()

    expected = torch.stack(
        [nll(pairs["safe"], i) - nll(pairs["harmful"], i) for i in range(3)]
    ).mean()
    torch.testing.assert_close(safety_loss(model, pairs), expected)


def test_two_answers_of_one_prompt_are_those_of_two_batches(world):
    """Loss and gradient, of prompts and answers of any length; one answer's labels begin a token before the other's, as where a tokenizer merges."""
    model, W, _, _ = world
    cut = lambda row, prompt: {
        "input_ids": row["input_ids"],
        "labels": [-100] * prompt + row["input_ids"][prompt:],
    }
    pairs = [
        (
            cut(example(20 + i, 10 + i, n=6 + 2 * i), 4),
            cut(example(30 + i, 10 + i, n=12 - 3 * i), 4 - i % 2),
        )
        for i in range(3)
    ]
    (safe, n), (harmful, m) = (response_nll(model, collate(rows)) for rows in zip(*pairs))
    expected = (safe / n - harmful / m).mean()
    found = safety_loss(model, collate_pairs(pairs))
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, W), torch.autograd.grad(expected, W)):
        torch.testing.assert_close(a, b)


def test_harmful_direction_is_a_unit_vector_along_which_the_model_gets_less_safe(world):
    model, W, _, pairs = world
    g_hat = g_hat_of(world)
    assert inner(g_hat, g_hat).item() == pytest.approx(1)
    loss = lambda: safety_loss(model, pairs).item()
    h = 1e-4
    slope = (moved(W, g_hat, h, loss) - moved(W, g_hat, -h, loss)) / (2 * h)
    raw = torch.autograd.grad(safety_loss(model, pairs), W)
    assert slope == pytest.approx(inner(raw, raw).sqrt().item(), rel=1e-5) and slope > 0


def test_harmful_direction_ignores_scale_and_flips_with_the_answers(world, monkeypatch):
    model, W, batch, pairs = world
    g_hat, V = g_hat_of(world), fit_probe(model, W, g_hat_of(world), batch, LAYERS, 0.1)
    flipped = harmful_direction(model, W, FLIPPED)
    V_flipped = fit_probe(model, W, flipped, batch, LAYERS, 0.1)
    for a, b in [*zip(g_hat, flipped), *zip(V.values(), V_flipped.values())]:
        torch.testing.assert_close(a, -b)
    monkeypatch.setattr(sap, "safety_loss", lambda *a: 1000 * safety_loss(*a))
    for a, b in zip(g_hat, g_hat_of(world)):
        torch.testing.assert_close(a, b)


def test_probe_gradient_equals_central_differences(world):
    model, W, batch, _ = world
    g_hat, h = g_hat_of(world), 1e-4
    d, g_V = probe_gradient(model, W, g_hat, batch, LAYERS)
    for j in LAYERS:
        for i in (0, 7, 31):
            e = torch.zeros(32, dtype=torch.float64)
            e[i] = h
            there, back = (
                (gradient(model, W, batch, {j: v}), useful_loss(model, batch, {j: v}))
                for v in (e, -e)
            )
            assert d[j][i].item() == pytest.approx(
                (inner(there[0], g_hat) - inner(back[0], g_hat)).item() / (2 * h),
                rel=1e-5,
                abs=1e-9,
            )
            assert g_V[j][i].item() == pytest.approx(
                (there[1] - back[1]).item() / (2 * h), rel=1e-5, abs=1e-9
            )


def test_a_slope_is_the_steepest_of_the_answer_s_beginnings(world):
    """Against central differences and gradients of every beginning alone; nothing is left behind."""
    model, W, batch, _ = world
    g_hat, h, logits = g_hat_of(world), 1e-4, model(batch["input_ids"])
    steeper = 0
    for toward in (g_hat, [-d for d in g_hat]):
        slopes = sap.row_slopes(model, W, toward, collate(ROWS), 3.5)
        expected = [slope_by_hand(model, W, toward, row, 3.5) for row in ROWS]
        whole = [inner(gradient(model, W, collate([row])), toward).item() for row in ROWS]
        assert slopes.tolist() == pytest.approx(expected) and not slopes.requires_grad
        steeper += sum(slope < 1.01 * min(0, alone) for slope, alone in zip(expected, whole))
    assert steeper  # than the whole answer
    t, begun = beginnings(ROWS[-1])[-1]
    loss = lambda: t * useful_loss(model, begun).item()
    alone = sap.row_slopes(
        model, W, g_hat, begun, 1000.0
    )  # of beginnings that all count as many the whole is the steepest here
    assert 1000 * alone.item() == pytest.approx(
        (moved(W, g_hat, h, loss) - moved(W, g_hat, -h, loss)) / (2 * h), rel=1e-5
    )
    assert torch.equal(model(batch["input_ids"]), logits)


def test_slopes_know_that_a_tied_head_is_the_embedding(world):
    _, _, _, pairs = world
    model = tiny_model(BASE | {"tie_word_embeddings": True})
    W = list(model.parameters())
    direction = harmful_direction(model, W, pairs)
    expected = [slope_by_hand(model, W, direction, row, 2) for row in ROWS]
    assert sap.row_slopes(model, W, direction, collate(ROWS), 2).tolist() == pytest.approx(expected)


def test_a_row_whose_loss_rises_from_its_first_token_on_has_a_slope_of_0(world, monkeypatch):
    """Though no token is without a label, whose slope would be 0."""
    model, W, _, _ = world
    monkeypatch.setattr(sap, "derivative_along", lambda *args: torch.ones(4))
    batch = {"input_ids": torch.arange(5)[None], "labels": torch.arange(5)[None]}
    assert sap.row_slopes(model, W, W, batch, min_tokens=1).tolist() == [0]


def test_a_token_whose_slope_is_no_number_leaves_its_row_with_none(world, monkeypatch):
    """Though the least of a row's beginnings ends before it."""
    model, W, batch, _ = world
    n = int((batch["labels"][:, 1:] != -100).sum())
    for place in (0, n - 1):
        for value in (float("inf"), -float("inf"), float("nan")):
            monkeypatch.setattr(
                sap,
                "derivative_along",
                lambda *args: (
                    -torch.ones(n, dtype=torch.float64).index_fill(0, torch.tensor(place), -value)
                ),
            )
            slopes = sap.row_slopes(model, W, W, batch, min_tokens=1)
            assert slopes.isfinite().tolist() == [
                b != (0 if place == 0 else len(slopes) - 1) for b in range(len(slopes))
            ]


ROWS = [example(i, n=6 + i) for i in range(4)] + [
    example(30 + i, 10 + i, n=7 + i) for i in range(3)
]  # the last: harmful answers


def test_a_probe_on_rows_leaves_out_those_whose_loss_falls_along_g_hat(world):
    """By the gradients of each row's beginnings alone, however many are asked at a time."""
    model, W, _, pairs = world
    g_safe = torch.autograd.grad(safety_loss(model, pairs), W)
    norm = inner(g_safe, g_safe).sqrt().item()
    slopes = [slope_by_hand(model, W, unit(g_safe), row, 4) for row in ROWS]
    for gate, batch_size in (
        (1e-9, 3),
        (-sorted(slopes)[2] / norm * 1.001, 7),
        (1e6, 2),
    ):  # all that fall; the two steepest; none
        kept = [slope >= -gate * norm for slope in slopes]
        assert sap.fit_rows(model, W, g_safe, ROWS, gate, 4, batch_size).tolist() == kept and (
            0 < sum(kept) < 7 or gate == 1e6 and sum(kept) == 7
        )


def test_the_safety_gradient_of_many_pairs_is_that_of_one_batch(world):
    model, W, _, pairs = world
    expected = torch.autograd.grad(safety_loss(model, pairs), W)
    for batch_size in (1, 2, 3):
        for a, b in zip(sap.safety_gradient(model, W, PAIRS, batch_size), expected):
            torch.testing.assert_close(a, b)


def test_rows_are_chosen_among_those_that_the_run_comes_to(world, monkeypatch):
    model, W, _, _ = world
    asked, fit = (
        [],
        lambda model, W, g_safe, *args: asked.append(args) or torch.zeros(4, dtype=bool),
    )
    monkeypatch.setattr("minisap.methods.fit_rows", fit)
    args = Namespace(
        **{**vars(ARGS), "gate": 0.3, "steps": 2, "batch_size": 2, "seed": 5, "pairs_per_step": 2}
    )
    counts = FILTERS["sap"](model, W, ROWS, PAIRS, args)
    seen = [row for step in range(2) for row in batch_rows(ROWS, 2, step, 5)]
    assert counts == [False if row in seen else None for row in ROWS] and len(seen) == 4
    assert asked == [
        ([row for row in ROWS if row in seen], 0.3, 4, 8)
    ]  # the pairs' harmful answers have 3, 4 and 5 tokens
    assert (
        FILTERS["sap"](model, W, ROWS, PAIRS, Namespace(**{**vars(args), "gate": 0.0}))
        == [True if row in seen else None for row in ROWS]
        and len(asked) == 1
    )


def test_a_batch_of_which_no_row_is_left_gives_the_safety_loss_alone(world):
    model, W, _, pairs = world
    g_safe = torch.autograd.grad(safety_loss(model, pairs), W)
    found, log = sap_step(model, W, collate([]), pairs, {"step": 0}, safety_weight=0.5)
    assert "loss" not in log and log["conflict"] == 0
    for a, b in zip(found, g_safe):
        torch.testing.assert_close(a, 0.5 * b)


def test_g_hat_is_kept_between_refreshes(world):
    model, W, batch, pairs = world
    toward, state = pairs["harmful"], {}
    first, log = sap_step(model, W, toward, pairs, {"step": 0}, safety_weight=0.1)
    for step, contrast, expected in (
        (0, pairs, first),
        (1, FLIPPED, first),
        (2, FLIPPED, sap_step(model, W, toward, FLIPPED, {"step": 0}, safety_weight=0.1)[0]),
    ):
        state["step"] = step
        found, log = sap_step(model, W, toward, contrast, state, safety_weight=0.1, refresh=2)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)) and (
            "safety_loss" in log
        ) == (step % 2 == 0)


def test_the_paper_s_g_hat_and_probe_are_kept_between_refreshes(world):
    """The second step takes those of the first, whatever its pairs and its batch; its batch is its own."""
    model, W, batch, pairs = world
    state, rows = {}, [collate(ROWS[i : i + 2]) for i in range(3)]
    step = lambda state, rows, contrast, refresh=1: paper_step(
        model, W, rows, contrast, state, LAYERS, 0.3, projection=True, refresh=refresh
    )[0]
    V = fit_probe(model, W, g_hat_of(world), rows[0], LAYERS, 0.3)
    between = project_out_harm(
        torch.autograd.grad(useful_loss(model, rows[1], V), W), g_hat_of(world)
    )
    for number, contrast, expected in (
        (0, pairs, step({"step": 0}, rows[0], pairs)),
        (1, FLIPPED, between),
        (2, FLIPPED, step({"step": 0}, rows[2], FLIPPED)),
    ):
        state["step"] = number
        assert all(
            torch.equal(a, b)
            for a, b in zip(step(state, rows[number], contrast, refresh=2), expected)
        )


def test_the_refusal_weight_adds_the_gradient_of_the_refusals_cross_entropy(world):
    model, W, batch, pairs = world
    found, log = sap_step(model, W, batch, pairs, {"step": 0}, refusal_weight=0.3)
    for a, b in zip(
        found,
        torch.autograd.grad(useful_loss(model, batch) + 0.3 * useful_loss(model, pairs["safe"]), W),
    ):
        torch.testing.assert_close(a, b)
    assert log["refusal_loss"] == useful_loss(model, pairs["safe"]).item()


def test_the_safety_weight_adds_the_safety_loss_s_gradient_after_the_projection(world):
    model, W, batch, pairs = world
    g_safe = torch.autograd.grad(safety_loss(model, pairs), W)
    plain, _ = sap_step(model, W, pairs["harmful"], pairs, {"step": 0}, projection=True)
    found, _ = sap_step(
        model, W, pairs["harmful"], pairs, {"step": 0}, projection=True, safety_weight=0.3
    )
    for a, b, c in zip(found, plain, g_safe):
        torch.testing.assert_close(a, b + 0.3 * c)
    expected, _ = METHODS["penalty"](
        model, W, batch, pairs, Namespace(strength={"penalty": 0.3}), {"step": 0}
    )
    for a, b in zip(
        sap_step(model, W, batch, pairs, {"step": 0}, safety_weight=0.3)[0], expected
    ):  # no probe, no projection
        torch.testing.assert_close(a, b)


def test_finite_difference_tends_to_the_exact_derivative_and_leaves_W_bit_identical(
    world, monkeypatch
):
    model, W, batch, _ = world
    g_hat, before = g_hat_of(world), [w.detach().clone() for w in W]
    exact = probe_gradient(model, W, g_hat, batch, LAYERS)
    asked, own = [], likelihood.prefixes_of
    monkeypatch.setattr(
        likelihood,
        "prefixes_of",
        lambda *args: asked.append(own(*args).origin.tolist()) or own(*args),
    )
    difference = probe_gradient_by_difference(
        model, W, g_hat, batch, LAYERS, epsilon=1e-6, hidden=[]
    )
    assert len(asked) == 2 and asked[0] == asked[1]  # else rounding would not cancel
    for j in LAYERS:
        assert F.cosine_similarity(exact[0][j], difference[0][j], dim=-1).min() > 0.99999
        torch.testing.assert_close(exact[1][j], difference[1][j])
    assert all(torch.equal(w, old) for w, old in zip(W, before))


def test_W_is_restored_when_the_inner_step_fails(world, monkeypatch):
    model, W, batch, _ = world
    g_hat, before, calls = g_hat_of(world), [w.detach().clone() for w in W], []

    def fails_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return useful_loss(*args)

    monkeypatch.setattr(sap, "useful_loss", fails_the_second_time)
    with pytest.raises(RuntimeError):
        probe_gradient_by_difference(model, W, g_hat, batch, LAYERS, epsilon=0.1)
    assert all(torch.equal(w, old) for w, old in zip(W, before))


def test_the_probe_turns_the_gradient_away_from_harm_by_the_predicted_amount(world):
    """⟨∇_W L_useful(W, V) − ∇_W L_useful(W, 0), ĝ⟩ = ⟨V, ∇_V ⟨∇_W L_useful, ĝ⟩⟩ to first order, and > 0."""
    model, W, batch, _ = world
    g_hat = g_hat_of(world)
    V = fit_probe(model, W, g_hat, batch, LAYERS, 1e-3)
    d, _ = probe_gradient(model, W, g_hat, batch, LAYERS)
    predicted = sum((V[j] * d[j]).sum() for j in LAYERS).item()
    measured = (
        inner(gradient(model, W, batch, V), g_hat) - inner(gradient(model, W, batch), g_hat)
    ).item()
    assert measured > 0 and measured == pytest.approx(predicted, rel=0.02)


def test_the_probe_is_the_bare_direction_and_its_cosine_with_the_task_s_is_logged(world):
    model, W, batch, _ = world
    g_hat, log = g_hat_of(world), {}
    V = fit_probe(model, W, g_hat, batch, LAYERS, 1e-3, log=log)
    d, g_V = probe_gradient(model, W, g_hat, batch, LAYERS)
    assert all(F.cosine_similarity(V[j], d[j], dim=0) > 1 - 1e-12 for j in LAYERS)
    assert log["probe_cosine"] == pytest.approx(
        sum(F.cosine_similarity(d[j], g_V[j], dim=0).item() for j in LAYERS) / 2
    )


def test_probe_has_the_asked_norm_relative_to_the_hidden_states(world):
    model, W, batch, _ = world
    V, hidden = fit_probe(model, W, g_hat_of(world), batch, LAYERS, radius=0.3), []
    model.model(batch["input_ids"], hidden=hidden)
    for j in LAYERS:
        norms = torch.stack(
            [hidden[j][b, t].norm() for b in range(4) for t in range(4, 6 + b)]
        )  # labelled tokens
        assert V[j].norm().item() == pytest.approx(0.3 * norms.median().item())
        assert median_norm(hidden[j], batch) == norms.median()


def test_projection_removes_only_what_leads_to_harm(world):
    model, W, batch, _ = world
    g_hat, g = g_hat_of(world), gradient(model, W, batch)
    toward = [x - (inner(g, g_hat) + 1) * h for x, h in zip(g, g_hat)]  # ⟨toward, ĝ⟩ = −1
    away = [-x for x in toward]
    projected = project_out_harm(toward, g_hat)
    assert inner(toward, g_hat).item() == pytest.approx(-1) and inner(
        projected, g_hat
    ).item() == pytest.approx(0, abs=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(project_out_harm(away, g_hat), away))
    for a, b in zip(project_out_harm(projected, g_hat), projected):  # idempotent
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_projections_do_not_suffer_from_half_precision(dtype):
    tiny = [torch.full((3000,), 1e-4, dtype=dtype)]  # squares vanish in float16
    assert inner(unit(tiny), unit(tiny)).item() == pytest.approx(1, rel=1e-5)
    g_hat = unit([torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)])
    projected = project_out_harm([(-3 * g_hat[0]).to(dtype)], g_hat)
    assert projected[0].dtype == dtype and abs(inner(projected, g_hat).item()) < 1e-3


ARGS = Namespace(
    gate=0.0,
    layers=LAYERS,
    radius=0.1,
    epsilon=0.0,
    projection="on",
    safety_weight=0.0,
    refusal_weight=0.0,
    refresh=1,
    seed=0,
    steps=9,
    strength=STRENGTH,
)


def test_without_probe_and_projection_sap_and_the_paper_s_are_sft_bit_for_bit(world):
    model, W, batch, pairs = world
    expected, _ = METHODS["sft"](model, W, batch, pairs, ARGS, {"step": 0})
    for found, _ in (
        sap_step(model, W, batch, pairs, {"step": 0}),
        paper_step(model, W, batch, pairs, {"step": 0}, LAYERS, radius=0.0),
        paper_step(model, W, batch, pairs, {"step": 0}, [], radius=1.0),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_the_paper_s_is_the_gradient_at_the_probe_and_paper_project_its_projection(world):
    model, W, batch, pairs = world
    g_hat = g_hat_of(world)
    at_probe = gradient(model, W, batch, fit_probe(model, W, g_hat, batch, LAYERS, 0.1))
    for method, expected in (
        ("paper", at_probe),
        ("paper_project", project_out_harm(at_probe, g_hat)),
    ):
        for a, b in zip(METHODS[method](model, W, batch, pairs, ARGS, {"step": 0})[0], expected):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", ["paper_project", "project", "sap"])
def test_a_step_toward_harm_loses_that_component_and_no_other(method, world):
    """The harmful answers themselves as the task: without the projection a step of descent makes the model less safe."""
    model, W, _, pairs = world
    V, args = {}, Namespace(**{**vars(ARGS), "projection": "on"})
    if method == "paper_project":
        V = fit_probe(model, W, g_hat_of(world), pairs["harmful"], ARGS.layers, ARGS.radius)
    plain = gradient(model, W, pairs["harmful"], V)
    conflict = inner(plain, g_hat_of(world)).item()
    found, log = METHODS[method](model, W, pairs["harmful"], pairs, args, {"step": 0})
    assert log["conflict"] == pytest.approx(conflict) and conflict < -0.1
    assert inner(found, g_hat_of(world)).item() == pytest.approx(0, abs=1e-12)
    assert inner(found, plain).item() == pytest.approx((inner(plain, plain) - conflict**2).item())


def test_project_is_sap_without_a_probe(world):
    model, W, batch, pairs = world
    found, _ = METHODS["project"](model, W, batch, pairs, ARGS, {"step": 0})
    for a, b in zip(found, project_out_harm(gradient(model, W, batch), g_hat_of(world))):
        torch.testing.assert_close(a, b)


def test_probes_of_norm_0_are_sft_and_the_projection(world):
    model, W, batch, pairs = world
    without = Namespace(**{**vars(ARGS), "radius": 0.0})
    for probe, plain in (("random_probe", "sft"), ("paper", "sft"), ("paper_project", "project")):
        found, expected = (
            METHODS[method](model, W, batch, pairs, without, {"step": 0})[0]
            for method in (probe, plain)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_random_probe_has_sap_s_norms_and_changes_with_step_and_seed(world, monkeypatch):
    model, W, batch, pairs = world
    used = []
    monkeypatch.setattr(
        "minisap.methods.useful_loss",
        lambda m, b, V=None, hidden=None: used.append(V) or useful_loss(m, b, V, hidden),
    )
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        METHODS["random_probe"](
            model, W, batch, None, Namespace(**{**vars(ARGS), "seed": seed}), {"step": step}
        )
    V_safe = fit_probe(model, W, g_hat_of(world), batch, LAYERS, 0.1)
    first, again, later, other = (V for V in used if V)
    for j in LAYERS:
        assert first[j].norm().item() == pytest.approx(V_safe[j].norm().item())
        assert (
            torch.equal(first[j], again[j])
            and not torch.equal(first[j], later[j])
            and not torch.equal(first[j], other[j])
        )


def test_mix_is_cross_entropy_over_both_sets_of_rows(world):
    model, W, batch, pairs = world
    rows = [example(i, i // 2, n=6 + i) for i in range(4)] + [
        example(20 + i, 10 + i) for i in range(3)
    ]
    for a, b in zip(
        METHODS["mix"](model, W, batch, pairs, ARGS, {"step": 0})[0],
        gradient(model, W, collate(rows)),
    ):
        torch.testing.assert_close(a, b)


def test_released_trains_each_batch_with_the_probe_of_the_batch_before(world):
    model, W, batch, pairs = world
    second, state = collate([example(50 + i) for i in range(3)]), {}
    first, _ = released(model, W, batch, pairs, ARGS, state)
    assert all(torch.equal(a, b) for a, b in zip(first, gradient(model, W, batch)))  # no probe yet
    found, _ = released(model, W, second, pairs, ARGS, state)
    d_of = lambda rows: probe_gradient_by_difference(model, W, g_hat_of(world), rows, [0], 2e-5)[0][
        0
    ]
    V = {0: 0.05 * d_of(batch) / (d_of(batch).abs() + 1e-8)}  # Adam's first step
    for a, b in zip(found, gradient(model, W, second, V)):
        torch.testing.assert_close(a, b)
    v = torch.zeros(32, dtype=torch.float64, requires_grad=True)  # and its second, by PyTorch
    adam = torch.optim.AdamW([v], lr=0.05, weight_decay=0.0)
    for rows in (batch, second):
        v.data.zero_()
        v.grad = -d_of(rows)
        adam.step()
    third, _ = released(model, W, batch, pairs, ARGS, state)
    for a, b in zip(third, gradient(model, W, batch, {0: v.detach()})):
        torch.testing.assert_close(a, b)


def test_the_methods_pass_every_argument_on(world):
    model, W, batch, pairs = world
    both = collate(ROWS)
    args = Namespace(
        **{
            **vars(ARGS),
            "layers": [0],
            "radius": 0.3,
            "epsilon": 0.1,
            "safety_weight": 0.3,
            "refusal_weight": 0.2,
            "refresh": 2,
        }
    )
    for change in ({}, {"projection": "off"}, {"safety_weight": 0.0}, {"refusal_weight": 0.0}):
        changed = {**vars(args), **change}
        expected, _ = sap_step(
            model,
            W,
            both,
            pairs,
            {"step": 0},
            changed["projection"] == "on",
            changed["safety_weight"],
            changed["refusal_weight"],
            refresh=2,
        )
        found, _ = METHODS["sap"](model, W, both, pairs, Namespace(**changed), {"step": 0})
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
    state = {"step": 0}
    METHODS["sap"](model, W, both, pairs, args, state)
    assert "g_safe" in state  # refresh arrives
    for epsilon in (0.0, 0.1):
        for name in ("paper", "paper_project"):
            expected, _ = paper_step(
                model,
                W,
                both,
                pairs,
                {"step": 0},
                [0],
                0.3,
                epsilon,
                projection=name == "paper_project",
            )
            found, _ = METHODS[name](
                model,
                W,
                both,
                pairs,
                Namespace(**{**vars(args), "epsilon": epsilon}),
                state := {"step": 0},
            )
            assert all(torch.equal(a, b) for a, b in zip(found, expected)) and "probe" in state


def test_a_slope_that_is_no_number_is_found_though_another_row_has_its_source(world, monkeypatch):
    """Which row it is must not depend on its name."""
    model, W, _, _ = world
    monkeypatch.setattr(sap, "row_slopes", lambda *args: torch.tensor([1.0, float("nan"), 1.0]))
    rows = [row | {"source": source} for row, source in zip(ROWS, ("a:1", "a:2", "a:2"))]
    for asked in (
        lambda: sap.fit_rows(model, W, [torch.ones_like(w) for w in W], rows, 0.5, 1, 3),
        lambda: sap.slopes_of(model, W, W, rows, 1, 3),
    ):
        with pytest.raises(NotFinite, match="the slope of a:2 is nan"):
            asked()


def test_checkpointing_changes_no_bit(world):
    """Of the gradients; and what is kept is less."""
    model, W, batch, pairs = world
    everything = lambda: [*gradient(model, W, batch), *g_hat_of(world)]

    def kept():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: sizes.append(x.numel()) or x, lambda x: x
        ):
            useful_loss(model, batch)
        return sum(sizes)

    sizes, plain = [], everything()
    before, sizes = kept(), []
    model.model.checkpointing = True
    assert all(torch.equal(a, b) for a, b in zip(everything(), plain)) and kept() < before / 2


def test_checkpointing_rests_while_something_moves_and_no_longer(world):
    model, W, batch, _ = world
    probed = lambda: [
        d
        for found in probe_gradient(model, W, g_hat_of(world), batch, LAYERS)
        for d in found.values()
    ]
    plain, model.model.checkpointing = probed(), True
    assert all(torch.equal(a, b) for a, b in zip(probed(), plain)) and model.model.checkpointing
    with pytest.raises(ZeroDivisionError):
        derivative_along(model, W, W, lambda _: 1 / 0)
    assert model.model.checkpointing and all(
        isinstance(w, torch.nn.Parameter) for w in model.parameters()
    )


def test_logits_of_a_few_tokens_at_a_time_give_the_same_gradients(world, monkeypatch):
    """To rounding, and the same slopes; the largest thing that is kept is not the logits."""
    model, W, batch, pairs = world
    derivatives = lambda: [
        *gradient(model, W, batch),
        sap.row_slopes(model, W, g_hat_of(world), batch, min_tokens=1),
    ]
    plain = derivatives()
    model.model.checkpointing = True
    monkeypatch.setattr(likelihood, "HEAD_TOKENS", 2)
    for a, b in zip(derivatives(), plain, strict=True):
        torch.testing.assert_close(a, b)
    largest = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: largest.append(x.numel()) or x, lambda x: x
    ):
        useful_loss(model, batch)
    labels = (batch["labels"] != -100).sum().item()
    assert max(largest) < labels * model.config.vocab_size


def test_no_method_changes_W_or_leaves_a_probe_behind(world):
    model, W, batch, pairs = world
    before, logits = [w.detach().clone() for w in W], model(batch["input_ids"])
    FILTERS["sap"](
        model,
        W,
        ROWS,
        PAIRS,
        Namespace(**{**vars(ARGS), "gate": 0.01, "batch_size": 2, "pairs_per_step": 2}),
    )
    for name, method, args in [
        *((name, method, ARGS) for name, method in METHODS.items()),
        ("sap", METHODS["sap"], Namespace(**{**vars(ARGS), "safety_weight": 0.1})),
    ]:
        contrast = pairs | ({"refused": batch} if name in ALIGN else {})
        grads, log = method(model, W, batch, contrast, args, {"step": 0, "batch": batch})
        assert [g.shape for g in grads] == [w.shape for w in W] and "loss" in log
    assert all(torch.equal(w, old) for w, old in zip(W, before)) and all(w.grad is None for w in W)
    assert torch.equal(model(batch["input_ids"]), logits)


def test_row_sums_do_not_depend_on_the_rest_of_the_batch(world):
    model, _, batch, _ = world
    nats, tokens = response_nll(model, batch)
    alone_nats, alone_tokens = response_nll(model, collate([example(0, n=6)]))
    torch.testing.assert_close(nats[:1], alone_nats)
    assert tokens.tolist() == [2, 3, 4, 5] and alone_tokens.tolist() == [2]


def test_exact_direction_survives_bfloat16_on_the_real_model(real):
    """In its first third, to be quick."""
    tokenizer, layers, found = Tokenizer(real), [4, 9], {}
    rows = [{"prompt": "Say a colour.", "response": "Blue.", "source": ""}]
    pair = [
        {
            "prompt": "How do I steal a car?",
            "safe": "I can't help with that.",
            "harmful": "Sure, here is how:",
            "source": "",
        }
    ]
    batch = collate(encode_rows(tokenizer, rows, 99))
    pairs = collate_pairs(encode_pairs(tokenizer, pair, 99))
    for dtype in (torch.float64, torch.bfloat16):
        model = load_model(real, dtype)
        model.model.layers = model.model.layers[:10]
        W = add_lora(model)
        found[dtype], _ = probe_gradient(
            model, W, harmful_direction(model, W, pairs), batch, layers
        )
    for j in layers:
        assert (
            F.cosine_similarity(found[torch.float64][j], found[torch.bfloat16][j].double(), dim=0)
            > 0.95
        )
