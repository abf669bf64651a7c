"""That what a run will take is known beforehand: against the allocator's own account of a whole model's steps, and for a model too large, before anything is written."""
import itertools
import os
from argparse import Namespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train as train_script
from minisap import memory
from minisap.config import LlamaConfig
from minisap.data import batch_rows, step_batches
from minisap.memory import estimate, free_memory, largest, peaks_of, rooms
from minisap.methods import METHODS
from minisap.model import Llama
from minisap.optimize import trainable, update
from minisap.rivals import STRENGTH
from minisap.sap import slopes_of
from test_sap import example
from tiny import BASE

CONFIG = LlamaConfig.from_hf(BASE | {"num_hidden_layers": 7})
ROWS = [example(i, 6, n=20 + i % 5) for i in range(12)]
PAIRS = [(example(20 + i, 10, n=16), example(30 + i, 10, n=18)) for i in range(6)]


def options(*flags):
    args = train_script.parse_args(["--model", "none", "--batch_size", "4", "--pairs_per_step", "3", "--steps", "5", "--device", "cpu", "--dtype", "float32", *flags])
    return Namespace(**vars(args) | {"strength": STRENGTH, "layers": list(range(7))})


@pytest.mark.parametrize("method, flags", [*((method, ()) for method in ("sft", "sap", "paper_project", "kl", "released", "vaccine", "lisa")),
                                           *((method, flags) for method in ("sft", "sap") for flags in (("--checkpointing",), ("--lora_rank", "0")))])
def test_what_small_models_take_tells_what_the_whole_one_takes(method, flags):
    """The tensors of the whole one's steps, to a thousandth; the allocator in a run of three steps, which knows of no tensors and sees what kernels take, too, to a tenth."""
    args = options(*flags)
    told, (rows, pairs, asked) = estimate(args, method, CONFIG, ROWS, PAIRS), rooms(args, ROWS, PAIRS)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        model = Llama(CONFIG)
        W, model.model.checkpointing = trainable(model, args), args.checkpointing
        optimizer, state = torch.optim.AdamW(W), {}
        if method == "sap":
            slopes_of(model, W, W, asked, len(asked))
        for state["step"] in range(3):
            grads, _ = METHODS[method](model, W, *step_batches(rows, pairs), args, state)
            update(optimizer, W, grads, args.clip, 1e-3)
            del grads
    allocations = sorted((event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"), key=lambda event: event.start_ns())
    assert told == pytest.approx(max(itertools.accumulate(event.nbytes() for event in allocations)), rel=0.1)
    assert told == pytest.approx(max(peaks_of(args, method, CONFIG, rows, pairs, asked)), rel=0.001)


def test_the_largest_batch_is_the_one_with_most_places_then_most_labels():
    args = options()
    sizes = {step: (max(len(ROWS[i]["labels"]) for i in batch), sum(label != -100 for i in batch for label in ROWS[i]["labels"]))
             for step in range(4) for batch in [batch_rows(range(len(ROWS)), 4, step, 0)]}
    chosen = largest(ROWS, 4, args)
    assert (max(len(ROWS[i]["labels"]) for i in chosen), sum(label != -100 for i in chosen for label in ROWS[i]["labels"])) == max(sizes.values())


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"^(sap|sft) takes about 0\.\d\d GiB at its peak, of which the weights are 0\.00; 0\.00 are free on cpu\. A smaller --batch_size, "):
        train_script.main(["--steps", "2", "--n_eval", "4", "--out_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_what_is_free_is_less_than_there_is():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_memory("cpu") is None or 0 < free_memory("cpu") < total
