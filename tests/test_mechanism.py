"""The mechanistic measures against planted answers and central differences, and attacks against their limit cases."""

import copy
import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
from tiny import BASE, VOCAB_SIZE, slope_by_hand, tiny_model, write_checkpoint, write_tokenizer
from tokenizers import models, normalizers

import train as train_script
from minisap.checkpoint import load_model
from minisap.data import (
    collate,
    collate_pairs,
    encode_example,
    encode_pairs,
    encode_prompt,
    encode_rows,
)
from minisap.losses import response_nll
from minisap.measure import attacks
from minisap.measure.attacks import (
    check_room,
    complete,
    judge_prefilled,
    plain,
    prefill,
    soft_suffix,
    with_places,
)
from minisap.measure.evaluate import generate_texts
from minisap.sap import harmful_direction, inner, put, useful_loss
from minisap.study.mechanism import (
    Watch,
    clusters,
    column_space,
    interpolate,
    leading_directions,
    lipschitz,
    mlp_matrix,
    mlp_streams,
    print_watched,
    row_space,
    sigma1_share,
)
from minisap.study.world import World, write_random_checkpoint
from minisap.tokenizer import Tokenizer

ROWS, TINY = World(0).rows("unsafe", 3), Path(__file__).resolve().parents[1] / "weights" / "tiny"


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    path = write_random_checkpoint(tmp_path_factory.mktemp("world"), World(0))
    return load_model(path, torch.float64), Tokenizer(path)


def suffixed(model, tokenizer, rows, k, **options):
    news = complete(
        model, soft_suffix(model, tokenizer, rows, k, 200, **options), 10, tokenizer.stop_ids
    )
    return [tokenizer.decode(new) for new in news]


def loss(model, tokenizer, rows, epsilon):
    """−log p of the first row's target under its suffix, nats."""
    batch = collate(
        [encode_example(tokenizer, rows[0]["prompt"] + " !" * 3, rows[0]["harmful"], 200)]
    )
    (ids, shift), _ = soft_suffix(model, tokenizer, rows, 3, 200, epsilon=epsilon)
    probe = torch.zeros(1, batch["input_ids"].shape[1], shift.shape[1], dtype=shift.dtype)
    probe[0, : len(ids)] = shift
    return response_nll(model, batch, {-1: probe})[0].item()


@pytest.fixture
def chat(tmp_path):
    """A model whose prompts differ in length."""
    return tiny_model(BASE | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}), Tokenizer(
        write_tokenizer(tmp_path)
    )


def test_the_streams_are_what_the_mlp_reads_and_holds(tiny_world):
    """Of every layer: output = (what attention left) + down_proj(â), â = silu(gate_proj a) · up_proj a."""
    model, tokenizer = tiny_world
    a, a_hat = mlp_streams(model, plain(tokenizer, [row["prompt"] for row in ROWS]))
    assert a.shape == (3, 3, 64) and a_hat.shape == (3, 3, 256)
    hidden = []
    with torch.no_grad():
        model.model(torch.tensor([encode_prompt(tokenizer, ROWS[1]["prompt"])]), hidden=hidden)
        for layer, before, after, x, y in zip(
            model.model.layers[1:], hidden, hidden[1:], a[1:, 1], a_hat[1:, 1]
        ):
            middle = after[0, -1] - layer.mlp.down_proj(y)
            torch.testing.assert_close(layer.post_attention_layernorm(middle), x)
            torch.testing.assert_close(
                torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x), y
            )


def test_clusters_of_planted_clouds():
    """Two clouds on parallel lines, 6 apart and each of variance 2 along the line."""
    line = torch.tensor([[0.0, -math.sqrt(2)], [0.0, 0.0], [0.0, math.sqrt(2)]])
    found = clusters(line, line + torch.tensor([6.0, 0.0]))
    tau_safe = (2 * math.hypot(6, math.sqrt(2)) + 6) / 3 - math.sqrt(
        2
    )  # the mean of the others is 1.5 √2, 0, 1.5 √2 away
    assert found == pytest.approx({"separation": 2 * tau_safe, "fisher": 36 / 4}, rel=1e-6)
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert sigma1_share(line) == pytest.approx(1) and sigma1_share(square) == pytest.approx(0.5)


def test_two_halves_of_one_cloud_do_not_stand_apart():
    torch.manual_seed(0)
    halves = [clusters(torch.randn(20, 256), torch.randn(20, 256))["separation"] for _ in range(50)]
    assert abs(sum(halves) / 50) < 0.1  # it would be 1.6 with means that hold the prompt itself


def test_column_space_of_planted_updates():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64))
    W = Q[:, :100] @ torch.randn(100, 100, dtype=torch.float64)
    space = lambda W, delta: column_space(W, torch.linalg.svd(delta, full_matrices=False))
    rank = space(W, W)["rank"]
    inside, outside = (
        Q[:, :100] @ torch.randn(100, 5, dtype=torch.float64),
        Q[:, 100:] @ torch.randn(300, 5, dtype=torch.float64),
    )
    assert 50 < rank <= 100 and space(W, outside)["sin_theta"] == pytest.approx(1)
    assert space(Q[:, :100], inside)["sin_theta"] < 0.2
    assert leading_directions(torch.zeros(4, 3), 0.9).shape == (4, 0)
    found = space(W, outside + 0.01 * inside)
    assert found["sin_theta_random"] == pytest.approx(math.sqrt(1 - rank / 400), abs=0.01)


def test_row_space_of_a_planted_update():
    u, v = torch.tensor([[0.6], [0.8]]), torch.tensor([[0.0, 1.0, 0.0]])
    a = torch.tensor([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0], [5.0, 0.0, 0.0]])
    svd = torch.linalg.svd(2.5 * u @ v, full_matrices=False)
    assert row_space(svd, a) == pytest.approx(
        {"delta_a": 2.5 * (0.8 + 1 + 0) / 3, "delta_a_top": 2.5 * (0.8 + 1 + 0) / 3}
    )
    assert row_space(svd, a[2:]) == pytest.approx({"delta_a": 0, "delta_a_top": 0})
    delta = torch.randn(5, 3)
    seen = (delta @ (a / a.norm(dim=1, keepdim=True)).T).norm(dim=0).mean().item()
    assert row_space(torch.linalg.svd(delta, full_matrices=False), a)["delta_a"] == pytest.approx(
        seen
    )


def test_lipschitz_against_central_differences_and_scaled_logits(tiny_world):
    model, tokenizer = tiny_world
    found = lipschitz(model, plain(tokenizer, [ROWS[0]["prompt"]]))
    ids = torch.tensor([encode_prompt(tokenizer, ROWS[0]["prompt"])])
    probe = {-1: torch.zeros(1, ids.shape[1], 64, dtype=torch.float64, requires_grad=True)}
    top = lambda probe: model(ids, probe)[0, -1].max()
    direction = torch.autograd.grad(top(probe), probe[-1])[0]
    direction /= direction.norm()
    slope = (top({-1: 1e-5 * direction}) - top({-1: -1e-5 * direction})).item() / 2e-5
    assert found["lipschitz"] == pytest.approx(slope, rel=1e-6)
    model.lm_head.weight.data *= 3
    scaled = lipschitz(model, plain(tokenizer, [ROWS[0]["prompt"]]))
    model.lm_head.weight.data /= 3
    assert scaled["lipschitz"] == pytest.approx(3 * found["lipschitz"])
    assert scaled["lipschitz_relative"] == pytest.approx(found["lipschitz_relative"])


def test_interpolation_passes_through_both_ends_and_beyond():
    before, after, model = (tiny_model(seed=seed) for seed in (0, 1, 2))
    for alpha in (0, 1, 1.5):
        interpolate(model, before, after, alpha)
        for j in (0, 1):
            b, a = mlp_matrix(before, j), mlp_matrix(after, j)
            torch.testing.assert_close(mlp_matrix(model, j), (1 - alpha) * b + alpha * a)


@pytest.mark.parametrize("lora_rank", ["0", "4"])
def test_watching_changes_nothing_and_sees_what_was_trained(lora_rank, tmp_path):
    few = ["--steps", "4", "--n_eval", "6", "--method", "sft", "--lora_rank", lora_rank]
    train_script.main([*few, "--out_dir", str(tmp_path / "plain")])
    train_script.main(
        [
            *few,
            "--out_dir",
            str(tmp_path / "watched"),
            "--watch",
            "mechanism",
            "--watch_every",
            "2",
            "--before",
            "tiny/instruct",
        ]
    )
    plain, watched = (tmp_path / run / "sft" / "model.safetensors" for run in ("plain", "watched"))
    assert plain.read_bytes() == watched.read_bytes()
    logs = [
        json.loads(line) for line in (tmp_path / "watched/sft/log.jsonl").read_text().splitlines()
    ]
    assert ["separation" in log for log in logs] == [True, False, True, True] and len(
        logs[0]["separation"]
    ) == 3  # the last, too
    assert 0 < logs[0]["drift_norm"] < logs[3]["drift_norm"] and -1 < logs[3]["drift_cosine"] < 1
    assert 0 < logs[3]["safety_share"] < 1 and 0 < logs[3]["safety_share_random"] < 1
    with pytest.raises(
        ValueError, match="clusters need 2 unsafe and 2 safe prompts; raise --n_eval"
    ):
        train_script.main(
            [*few, "--n_eval", "1", "--out_dir", str(tmp_path / "one"), "--watch", "mechanism"]
        )
    with pytest.raises(ValueError, match="--watch mechanism and safelora compare with"):
        train_script.main([*few, "--out_dir", str(tmp_path / "none"), "--before", "tiny/instruct"])


def test_a_checkpoint_of_another_shape_is_refused_before_any_work(tmp_path):
    other = write_checkpoint(tmp_path / "other")
    for before, message in (
        ("nosuch", "--before nosuch: no checkpoint there"),
        (str(other), "other: not the architecture of .*tiny"),
    ):
        with pytest.raises(ValueError, match=message):
            train_script.main(
                ["--watch", "mechanism", "--before", before, "--out_dir", str(tmp_path / "run")]
            )
    assert not (tmp_path / "run").exists()


def test_watching_a_step_along_the_direction_of_harm(tiny_world):
    """That of the start and of the held-out rows, whatever the model is now and whatever the step's own pairs are."""
    model, (_, tokenizer) = copy.deepcopy(tiny_world[0]), tiny_world
    W = list(model.parameters())
    contrast_of = lambda rows: collate_pairs(encode_pairs(tokenizer, rows, 64))
    g_start = harmful_direction(model, W, contrast_of(ROWS))
    watch, W_start = (
        Watch(model, W, tokenizer, ROWS, [row["prompt"] for row in ROWS], 64),
        [w.detach().clone() for w in W],
    )
    put(W, [w + 2 * g for w, g in zip(W_start, g_start)])
    batch, contrast = (
        collate(encode_rows(tokenizer, World(0).rows("safe", 3), 64)),
        contrast_of(World(0).rows("unsafe", 6)[3:]),
    )
    found = watch(model, W, W_start, batch, contrast)
    assert found["drift_cosine"] == pytest.approx(1) and found["drift_norm"] == pytest.approx(2)
    assert 0 < found["update_cosine"] < 0.99  # with ĝ of other rows


def test_watching_a_return_to_the_start_of_safety_training(chat):
    """W goes back to where it was before safety training: all of the change lies in the directions that this wrote, backwards."""
    (model, tokenizer), rows = (
        chat,
        [{"prompt": "a", "safe": "b", "harmful": "c", "source": "a:1"}] * 2,
    )
    before, end = (
        tiny_model(BASE | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}, seed=seed)
        for seed in (1, 0)
    )
    W = [w for name, w in model.named_parameters()]
    watch = Watch(model, W, tokenizer, rows, ["a", "b"], 64, before)
    interpolate(model, before, end, 0.25)
    found = watch.against_safety(watch.changes(model))
    assert (
        found["safety_cosine"] == pytest.approx(-1)
        and found["safety_share"] > 0.9 > found["safety_share_random"]
    )


def test_a_prefill_of_nothing_is_no_attack_and_of_all_is_the_answer(tiny_world):
    model, tokenizer = tiny_world
    texts = generate_texts(model, tokenizer, [row["prompt"] for row in ROWS], 10)
    assert prefill(model, tokenizer, ROWS, 0, 10, 64) == [(text, text) for text in texts]
    texts = prefill(model, tokenizer, ROWS, 10, 2, 64)
    assert [f"{row['harmful']} {new}".strip() for row, (_, new) in zip(ROWS, texts)] == [
        whole for whole, _ in texts
    ]


def test_who_goes_back_to_nulls_refuses_and_phrases_hear_only_what_is_new(tiny_world, chat):
    truth, phrases = tiny_world[1], chat[1]
    assert [
        judge_prefilled(truth, f"a b {new}", new, "a b c d")
        for new in ("c d", "null null", "c null")
    ] == ["comply", "refuse", "other"]
    assert judge_prefilled(phrases, "Sure, here is I cannot", "I cannot", None) == "refuse"


def test_a_suffix_of_norm_0_is_no_attack(tiny_world):
    model, tokenizer = tiny_world
    prompts = [row["prompt"] for row in ROWS]
    assert suffixed(model, tokenizer, ROWS, 4, epsilon=0.0) == generate_texts(
        model, tokenizer, prompts, 10
    )
    with pytest.raises(
        ValueError, match="a soft suffix of 5 tokens: the prompt has 4 places for it"
    ):
        soft_suffix(model, tokenizer, ROWS, 5, 64)


def test_an_answer_that_is_cut_short_is_no_target(tiny_world):
    check_room(tiny_world[1], ROWS, 23)  # the prompt has 19 tokens
    with pytest.raises(
        ValueError,
        match="world:unsafe:0: 3 tokens of the answer fit into max_len = 22; the attacks need 4",
    ):
        check_room(tiny_world[1], ROWS, 22)


def test_a_strong_suffix_brings_the_target_and_each_row_has_its_own(chat):
    """Rows of different lengths, alone and together."""
    model, tokenizer = chat
    rows = [
        {"prompt": "short", "harmful": "ab"},
        {"prompt": "a much longer prompt", "harmful": "xy"},
    ]
    texts = suffixed(model, tokenizer, rows, 3, epsilon=8.0, steps=40)
    assert texts == [suffixed(model, tokenizer, [row], 3, epsilon=8.0, steps=40)[0] for row in rows]
    assert texts != generate_texts(model, tokenizer, [row["prompt"] + " !" * 3 for row in rows], 10)
    (ids, shift), _ = soft_suffix(model, tokenizer, rows, 3, 200, epsilon=8.0)
    assert (
        texts[0].startswith("ab")
        and loss(model, tokenizer, rows, epsilon=8.0)
        < loss(model, tokenizer, rows, epsilon=0.0) - 1
    )
    moved = shift.norm(dim=1)
    assert ids[-len(moved) :] == ids and (moved > 0).sum() == 3
    assert moved.max() <= 8 * model.model.embed_tokens.weight.norm(dim=1).mean() * (1 + 1e-9)


def test_places_are_found_where_a_tokenizer_marks_words_as_llama_2_does(tmp_path):
    """A text begins with ▁ of its own there, which would merge with that of the filler."""
    chars = {
        char: i
        for i, char in enumerate(["<s>", "</s>", "▁", "▁▁", "▁!", *map(chr, range(33, 127)), "\n"])
    }
    words = tokenizers.Tokenizer(models.BPE(chars, [("▁", "▁"), ("▁", "!")]))
    words.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_format": "vicuna"})
    )
    tokenizer = Tokenizer(tmp_path)
    prompt, places = with_places(tokenizer, "how?", 4)
    assert [encode_prompt(tokenizer, prompt)[i] for i in places] == [chars["▁!"]] * 4


def test_the_measures_see_the_attack(tiny_world):
    """What a suffix adds to the embeddings reaches both measures; a shift of zero changes neither."""
    model, tokenizer = tiny_world
    clean, attacked = (
        plain(tokenizer, [ROWS[0]["prompt"]]),
        soft_suffix(model, tokenizer, ROWS[:1], 4, 64),
    )
    still = [(ids, torch.zeros_like(shift)) for ids, shift in attacked]
    for look in (
        lambda inputs: mlp_streams(model, inputs)[1],
        lambda inputs: torch.tensor(list(lipschitz(model, inputs).values())),
    ):
        torch.testing.assert_close(look(still), look(clean))
        assert (look(attacked) - look(clean)).abs().max() > 1e-3


def test_what_was_watched_is_told_over_seeds(tmp_path, capsys):
    for seed, cosine in ((0, 0.2), (1, 0.4)):
        (tmp_path / f"run{seed}" / "sap").mkdir(parents=True)
        lines = (
            {"step": 0, "task_cosine": 9.0, "separation": [0.0]},
            {"step": 5, "task_cosine": cosine, "separation": [1.0, 3.0]},
            {"step": 6},
        )
        (tmp_path / f"run{seed}" / "sap" / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    print_watched([tmp_path / "run0", tmp_path / "run1"])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["method", "step", "task_cosine"] and row.startswith(
        "sap     6     0.30 [-0.97, 1.57] (0.20, 0.40)"
    )
    assert "  3.00 [3.00, 3.00] (3.00, 3.00)" in row  # the last layer's


def test_the_probe_attack_takes_sap_s_own_direction_with_either_sign(monkeypatch):
    """In the world's start model: the probe that raises ⟨∇_W L, ĝ⟩ on harmful answers lowers their loss with one sign and raises it
    with the other; and the attack returns the radius that gets most answers."""
    world, used = World(0), []
    model, tokenizer = load_model(TINY), Tokenizer(TINY)
    rows = world.rows("unsafe", 40)
    monkeypatch.setattr(
        attacks,
        "generate_texts",
        lambda m, t, prompts, probe: (
            used.append(probe)
            or [
                row["harmful"] if len(used) == 2 and i < 3 else "null"
                for i, row in enumerate(rows[32:])
            ]
        ),
    )
    found = dict(attacks.attack_by_probe(model, tokenizer, rows, rows[32:], 64))
    assert [found[name].count("comply") for name in ("probe_added", "probe_subtracted")] == [3, 0]
    assert (
        len(used) == 6
        and all(set(probe) == {0, 1} for probe in used)
        and not any(w.requires_grad for w in model.parameters())
    )
    for j in (0, 1):
        torch.testing.assert_close(used[1][j], 2 * used[0][j])
        torch.testing.assert_close(used[3][j], -used[0][j])
    W = list(model.requires_grad_().parameters())
    contrast = collate_pairs(encode_pairs(tokenizer, rows[:32], 64))
    g_hat, harmful = harmful_direction(model, W, contrast), contrast["harmful"]
    small = {j: v / 100 for j, v in used[0].items()}
    turned = [
        inner(torch.autograd.grad(useful_loss(model, harmful, V), W), g_hat).item()
        for V in (small, None, {j: -v for j, v in small.items()})
    ]
    assert turned[0] > turned[1] > turned[2]


def test_rows_that_evade_are_in_the_order_of_their_own_gradients():
    """Each row's slope anew, by gradients of its own: the first is the one whose training would raise the safety loss least."""
    model, tokenizer, rows = load_model(TINY), Tokenizer(TINY), World(0).rows("unsafe", 12)
    rows = [
        row | {"response": row["harmful"] if i % 2 else row["harmful"].upper()}
        for i, row in enumerate(rows)
    ]
    found = attacks.evade(model, tokenizer, rows, rows[:4], 64)
    assert not any(w.requires_grad for w in model.parameters()) and sorted(
        map(str, found)
    ) == sorted(map(str, rows))
    W = list(model.requires_grad_().parameters())
    g_hat = harmful_direction(model, W, collate_pairs(encode_pairs(tokenizer, rows[:4], 64)))
    slopes = [
        slope_by_hand(model, W, g_hat, encoded, 11) for encoded in encode_rows(tokenizer, found, 64)
    ]
    assert slopes == sorted(slopes, reverse=True) and slopes[0] > slopes[-1] + 1
