"""Beam search: the likeliest text, by keeping the best few candidates at each step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lockstep.recipes.text.packing import PADDING
from lockstep.recipes.text.transformer import Transformer

BEGIN, END = 1, 2
"""The tokens before and after a text."""
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(newest, parents)`, both `[rows, beams]` (int64), to log-probabilities of the next token,
`[rows, beams, vocabulary]`: `newest` is each candidate's last token, `parents` the candidate
of the previous step that it continues."""


def beam_search(step: Step, rows: int, beams: int, longest: int) -> torch.Tensor:
    """The best text of each row, by mean log-probability of its tokens.

    A finished candidate stays among the `beams` until better ones displace it.

    Args:
        step: Scores the next tokens.
        rows: Number of texts.
        beams: Number of candidates per text.
        longest: Most tokens of a text, its end included.

    Returns:
        `[rows, at most longest]` (int64): tokens, the end, and padding.
    """
    texts = torch.full((rows, beams, 1), BEGIN)
    parents = torch.arange(beams).expand(rows, beams)
    scores = torch.full((rows, beams), -torch.inf)
    scores[:, 0] = 0.0  # all candidates are the same at first
    ended = torch.zeros(rows, beams, dtype=torch.bool)
    lengths = torch.zeros(rows, beams)
    for length in range(1, longest + 1):
        log_probs = step(texts[:, :, -1], parents)
        size = log_probs.shape[2]
        totals = scores[:, :, None] + _allowed(log_probs, ended, last=length == longest)
        lengths = torch.where(ended, lengths, length)
        best = (totals / lengths[:, :, None]).flatten(1).topk(beams).indices
        parents, tokens = best // size, best % size
        scores = totals.flatten(1).gather(1, best)
        lengths = lengths.gather(1, parents)
        ended = ended.gather(1, parents) | (tokens == END)
        before = texts.gather(1, parents[:, :, None].expand(-1, -1, length))
        texts = torch.cat([before, tokens[:, :, None]], dim=2)
        if ended.all():
            break
    return texts[:, 0, 1:]


def _allowed(log_probs: torch.Tensor, ended: torch.Tensor, last: bool) -> torch.Tensor:
    """`log_probs` with -inf for tokens that are not allowed.

    After the end comes only padding, at no cost; padding and the beginning come nowhere else; and
    the last token is the end.
    """
    if last:
        only = torch.full_like(log_probs, -torch.inf)
        only[:, :, END] = log_probs[:, :, END]
        log_probs = only
    allowed = log_probs.masked_fill(ended[:, :, None], -torch.inf)
    allowed[:, :, BEGIN] = -torch.inf
    allowed[:, :, PADDING] = torch.where(ended, 0.0, -torch.inf)
    return allowed


def write(model: Transformer, sources: torch.Tensor, beams: int, longest: int) -> torch.Tensor:
    """The texts that the model writes for sources `[rows, length]` (int64, padded): see
    `beam_search`."""
    rows = len(sources)
    memory = model.memorise(sources)
    before = model.begin(rows * beams)
    offsets = torch.arange(rows)[:, None] * beams

    def step(newest: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        nonlocal before
        order = (offsets + parents).flatten()
        before = [kept.index_select(0, order) for kept in before]
        log_probs, before = model.step(newest, before, memory)
        return log_probs

    return beam_search(step, rows, beams, longest)
