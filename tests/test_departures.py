"""That each departure of the released code departs, in what its name says and in nothing else."""

import pytest
import torch
import torch.nn.functional as F
from departures import (
    DEPARTURES,
    by_difference,
    in_bfloat16,
    logsigmoid_loss,
    prompt_only,
    stale,
    under_dropout,
    unshifted_loss,
    without_eos,
)
from test_sap import LAYERS, PAIRS, example, g_hat_of, world  # noqa: F401 (a fixture)

import train
from minisap import sap
from minisap.data import collate
from minisap.sap import fit_probe

ROWS = [example(i, n=6 + i) for i in range(3)]


def test_the_answer_is_hidden_and_stays_the_label():
    batch, plain = prompt_only(ROWS, PAIRS, "cpu")[0], collate(ROWS)
    answer = plain["labels"] != -100
    assert torch.equal(batch["labels"], plain["labels"]) and not batch["input_ids"][answer].any()
    assert torch.equal(batch["input_ids"][~answer], plain["input_ids"][~answer])


def test_the_last_label_alone_is_masked():
    batch, plain = without_eos(ROWS, PAIRS, "cpu")[0], collate(ROWS)
    for i, row in enumerate(ROWS):
        n = len(row["labels"])
        assert batch["labels"][i, n - 1] == -100 and torch.equal(
            batch["labels"][i, : n - 1], plain["labels"][i, : n - 1]
        )


def test_unshifted_and_saturated_losses_are_what_they_are_called(world):  # noqa: F811
    model, _, _, pairs = world

    def by_hand(batch, shift):
        logp = torch.log_softmax(model(batch["input_ids"]), dim=-1)
        places = [
            [(t - shift, ids[t]) for t in range(1, len(ids)) if labels[t] != -100]
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist())
        ]
        return [[logp[i, at, token].item() for at, token in row] for i, row in enumerate(places)]

    means = [sum(row) / len(row) for key in ("safe", "harmful") for row in by_hand(pairs[key], 0)]
    assert unshifted_loss(model, pairs).item() == pytest.approx(
        sum(means[3:]) / 3 - sum(means[:3]) / 3
    )
    sums = [
        torch.tensor([sum(row) for row in by_hand(pairs[key], 1)]) for key in ("safe", "harmful")
    ]
    assert logsigmoid_loss(model, pairs).item() == pytest.approx(
        -F.logsigmoid(sums[0] - sums[1]).mean().item(), rel=1e-5
    )


def test_every_batch_meets_the_probe_of_the_one_before(world):  # noqa: F811
    model, W, batch, pairs = world
    fit, g_hat = stale([]), g_hat_of(world)
    first, second = (
        fit(model, W, g_hat, rows, LAYERS, 0.1, 0.0, {}) for rows in (batch, pairs["safe"])
    )
    expected = fit_probe(model, W, g_hat, batch, LAYERS, 0.1)
    assert first == {} and all(torch.equal(second[j], expected[j]) for j in LAYERS)


@pytest.mark.parametrize("noisy", [in_bfloat16, under_dropout])
def test_a_noisy_difference_has_the_norm_but_not_the_direction(noisy, world):  # noqa: F811
    model, W, batch, _ = world
    model.to(torch.float32)
    g_hat, plain = g_hat_of(world), sap.fit_probe
    exact = plain(model, W, g_hat, batch, LAYERS, 0.1)
    found, quiet = (
        fit(model, W, g_hat, batch, LAYERS, 0.1, 0.0, {}) for fit in (noisy, by_difference)
    )
    for j in LAYERS:
        assert F.cosine_similarity(quiet[j], exact[j], dim=0) > 0.99  # it is not ε alone
        assert found[j].norm().item() == pytest.approx(exact[j].norm().item(), rel=0.2)
        assert F.cosine_similarity(found[j].float(), exact[j].float(), dim=0) < 0.9


@pytest.mark.parametrize("name", DEPARTURES)
def test_every_departure_reaches_the_step_and_leaves_nothing_behind(name, world):  # noqa: F811
    model, W, _, _ = world
    model.to(torch.float32)

    def two_steps():
        found = []
        for _ in range(2):
            batch, pairs = train.step_batches(ROWS, PAIRS, "cpu")
            found.append(
                sap.paper_step(
                    model, W, batch, pairs, {"step": 0}, LAYERS, radius=0.3, projection=True
                )[0]
            )
        return [g for step in found for g in step]

    plain = two_steps()
    with DEPARTURES[name]():
        departed = two_steps()
    assert all(torch.equal(a, b) for a, b in zip(departed, plain)) == (name == "none")
    assert all(torch.equal(a, b) for a, b in zip(two_steps(), plain))
