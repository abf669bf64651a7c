"""How likely a model finds what it is to say: the negative log-likelihood of every labelled token, and of every row. Of every layer but
attention nothing is computed twice, and nothing that no label needs."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minisap.model import Prefixes, per_token, widen
from minisap.support import distributed as parallel

HEAD_TOKENS = 1024


def token_nll(model, batch, probe=None, hidden=None):
    """(nll, rows, places), all (N,): the negative log-likelihood in nats of every labelled token, and where it stands. Tokens that rows have in common at their
    beginning are computed once, and none from which no label follows; into `hidden` goes what every layer puts out, (B, T, D), of a row's last label, too."""
    labelled = batch["labels"][:, 1:] != -100  # position t predicts token t + 1
    part = {key: x[parallel.mine(len(labelled))] for key, x in batch.items()}
    x = model.model(
        part["input_ids"],
        probe,
        prefixes=prefixes_of(part, per_token(probe), hidden is not None),
        hidden=hidden,
    )  # (B, T, D)
    predicts = part["labels"][:, 1:] != -100
    nll = head_nll(
        model, x[:, :-1][predicts], part["labels"][:, 1:][predicts]
    )  # only where a label is
    rows, columns = labelled.nonzero(as_tuple=True)
    return parallel.gathered(nll, labelled), rows, columns + 1


def prefixes_of(batch, apart=False, whole=False):
    """Of a batch's rows, up to the tokens from which their last labels are predicted; whole: up to those labels."""
    ids, labels = batch["input_ids"], batch["labels"][:, 0 if whole else 1 :]
    ends = labels.ne(-100).flip(1).cumsum(1).ne(0).sum(1).tolist()
    return Prefixes.of(
        [row[:end] for row, end in zip(ids.tolist(), ends)], ids.shape[1], ids.device, apart
    )


def head_nll(model, x, targets):
    """Nats of every target (N,), predicted from the hidden states x (N, D). Where no gradient follows, and with --checkpointing, the logits
    of HEAD_TOKENS tokens at a time are all that there is of them, in the backward pass, too."""
    nats = lambda x, targets: F.cross_entropy(
        widen(model.lm_head(x)), targets, reduction="none"
    )  # by logits (N, V)
    if torch.is_grad_enabled() and not model.model.checkpointing:
        return nats(x, targets)
    nats_of = (
        (lambda *part: checkpoint(nats, *part, use_reentrant=False))
        if torch.is_grad_enabled()
        else nats
    )
    return torch.cat(
        [nats_of(*part) for part in zip(x.split(HEAD_TOKENS), targets.split(HEAD_TOKENS))]
    )


def response_nll(model, batch, probe=None, hidden=None):
    """(nats, tokens), both (B,): each row's negative log-likelihood of its labelled tokens, and how many they are."""
    nll, rows, _ = token_nll(model, batch, probe, hidden)
    nats = torch.zeros(len(batch["labels"]), dtype=nll.dtype, device=nll.device).index_add(
        0, rows, nll
    )
    return nats, (batch["labels"][:, 1:] != -100).sum(1)
