"""Attacks that need the model's weights, on prompts that it refuses. (Those that need none are sets of prompts: see SETS in world.py.)

prefill       the answer has begun: the first k tokens of a compliant one are put into the model's mouth
soft suffix   k places after the text, whose embeddings are moved by gradient steps toward the compliant answer, each at most by
              ε times the mean norm of an embedding (Adv in arXiv 2407.10264)
"""
import torch

from minisap.data import collate, encode_example, encode_prompt
from minisap.sap import response_nll
from minisap.world import FILLERS

FILLER = " !"                                                               # what a place for the suffix holds, outside of the world


def prefill(model, tokenizer, rows, k, max_new_tokens, max_len):
    """Completions that begin with the first k tokens of row["harmful"]: one text per row, these tokens included."""
    begun = []
    for row in rows:
        ids = encode_prompt(tokenizer, row["prompt"])
        begun.append((ids, encode_example(tokenizer, row["prompt"], row["harmful"], max_len)["input_ids"][len(ids):][:k]))
    news = model.generate([ids + first for ids, first in begun], max_new_tokens, tokenizer.stop_ids)
    return [tokenizer.decode(first + new) for (_, first), new in zip(begun, news)]


def with_places(tokenizer, prompt, k):
    """(prompt with k places for a suffix, their indices among its ids). In the world every prompt has its own."""
    if tokenizer.chat_format == "world":
        filler = tokenizer.encode(FILLERS[0])[0]
    else:
        prompt, filler = prompt + FILLER * k, tokenizer.encode(FILLER)[-1]
    places = [i for i, token in enumerate(encode_prompt(tokenizer, prompt)) if token == filler]
    if len(places) < k:
        raise ValueError(f"a soft suffix of {k} tokens: the prompt has {len(places)} places for it")
    return prompt, places[:k] if tokenizer.chat_format == "world" else places[-k:]


def soft_suffix(model, tokenizer, rows, k, epsilon, max_new_tokens, max_len, steps=10):
    """Completions under a soft suffix of k tokens that was fitted to each row by `steps` normalised gradient steps on
    −log p(row["harmful"]): one text per row."""
    placed = [with_places(tokenizer, row["prompt"], k) for row in rows]
    batch = collate([encode_example(tokenizer, prompt, row["harmful"], max_len) for (prompt, _), row in zip(placed, rows)],
                    device=model.lm_head.weight.device)
    embedding = model.model.embed_tokens.weight.detach()
    radius = epsilon * embedding.norm(dim=1).mean()
    places = torch.tensor([indices for _, indices in placed], device=embedding.device)[:, :, None].expand(-1, -1, embedding.shape[1])
    spread = lambda suffix, T, shift=0: embedding.new_zeros(len(rows), T, embedding.shape[1]).scatter(1, places + shift, suffix)
    suffix = embedding.new_zeros(places.shape)                              # (rows, k, D)
    for _ in range(steps):
        suffix.requires_grad_()
        nats, _ = response_nll(model, batch, {-1: spread(suffix, batch["input_ids"].shape[1])})
        gradient, = torch.autograd.grad(nats.sum(), suffix)
        with torch.no_grad():
            suffix = suffix - 2.5 * radius / steps * gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            suffix = suffix * (radius / suffix.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _ in placed]
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=embedding.device)[:, None, None]
    news = model.generate(prompts, max_new_tokens, tokenizer.stop_ids, probe={-1: spread(suffix, longest, padding)})
    return [tokenizer.decode(new) for new in news]
