"""What the recipes on texts share: subwords, the transformer, beam search, ROUGE, neighbours."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from lockstep.errors import JobError
from lockstep.recipes.text.beam import BEGIN, END, beam_search, write
from lockstep.recipes.text.encoded import Ragged, padded, read
from lockstep.recipes.text.neighbours import Neighbours
from lockstep.recipes.text.packing import PADDING, Packing
from lockstep.recipes.text.rouge import rouge
from lockstep.recipes.text.transformer import Shape, Transformer, positions_of
from lockstep.recipes.text.vocabulary import SPECIAL, Vocabulary

TEXTS = [
    f"the {a} {b} of the {c}"
    for a, b, c in itertools.product(
        ("small", "large", "useful"), ("tool", "library", "window"), ("editor", "café", "server")
    )
]


# Subwords.


def test_subwords_are_the_same_every_time() -> None:
    code = (
        "import hashlib; from tests.recipes.test_text_models import TEXTS, Vocabulary; "
        "v = Vocabulary.learn(TEXTS, 330); "
        "print(hashlib.sha256(v._tokenizer.to_str().encode()).hexdigest())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    here = Vocabulary.learn(TEXTS, 330)
    assert 270 < len(here) <= 330
    assert ended.stdout.strip() == hashlib.sha256(here._tokenizer.to_str().encode()).hexdigest()


def test_every_text_comes_back() -> None:
    vocabulary = Vocabulary.learn(TEXTS, 330)
    texts = [*TEXTS, "Übergröße, 日本語 <pad> \x01", "C++ (v1.0) -- «x»"]
    rows = list(vocabulary.encode(texts))
    assert vocabulary.decode(rows) == texts
    assert all(SPECIAL <= token < len(vocabulary) for row in rows for token in row)
    assert len(rows[0]) < len(TEXTS[0]) / 3  # words have become tokens
    assert vocabulary.decode([[BEGIN, *rows[0], END, PADDING]]) == texts[:1]


def test_without_tokenizers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(JobError, match=r"pip install 'lockstep-dlp\[text\]'"):
        Vocabulary.learn(TEXTS, 300)


# Tables.


def test_packing_there_and_back() -> None:
    table = padded([[4, 5, 6], [7], [8, 9]])
    assert table.tolist() == [[4, 5, 6], [7, 0, 0], [8, 9, 0]]
    rows = Packing.of(table)
    assert rows.pack(table).tolist() == [4, 5, 6, 7, 8, 9]
    tokens = torch.randn(6, 4)
    spread = rows.spread(tokens)
    assert rows.pack(spread).equal(tokens)
    assert spread[1, 1:].eq(0).all()


def test_long_sources_keep_both_ends() -> None:
    vocabulary = Vocabulary.learn(TEXTS, 330)
    text = " ".join(TEXTS)
    (whole,) = vocabulary.encode([text])
    (row,) = read([text], vocabulary, 20)
    assert row == [*whole[:14], *whole[-5:], END]
    assert read(["", "the"], vocabulary, 20) == [[END], [*next(vocabulary.encode(["the"])), END]]
    (exact,) = read([vocabulary.decode([whole[:19]])[0]], vocabulary, 20)
    assert exact == [*whole[:19], END]


def test_ragged_rows() -> None:
    rows = Ragged.of([[1, 2], [], [3]])
    assert [rows[n].tolist() for n in range(len(rows))] == [[1, 2], [], [3]]


# The transformer.

SHAPE = Shape(vocabulary=9, width=8, heads=2, encoders=1, decoders=2, dropout=0.0)


@pytest.fixture
def model() -> Iterator[Transformer]:
    torch.manual_seed(0)
    model = Transformer(SHAPE).eval()
    with torch.no_grad():
        model.embedding.weight.mul_(3)  # so that it has opinions
        yield model


def log_prob(model: Transformer, source: list[int], target: list[int]) -> float:
    return -float(model(torch.tensor([source]), torch.tensor([[BEGIN, *target]])))


def test_padding_changes_nothing(model: Transformer) -> None:
    sources, targets = [[4, 5, 6, END], [7, END]], [[3, 8, END], [5, 3, 3, 4, END]]
    together = model(padded(sources), padded([[BEGIN, *row] for row in targets]))
    alone = [log_prob(model, s, t) for s, t in zip(sources, targets, strict=True)]
    assert together.tolist() == pytest.approx([-value for value in alone], rel=1e-5)


def test_probabilities_of_all_texts_add_up_to_one(model: Transformer) -> None:
    source = [4, 5, END]
    total = sum(
        torch.tensor(log_prob(model, source, [first, second])).exp().item()
        for first, second in itertools.product(range(1, SHAPE.vocabulary), repeat=2)
    )
    # Tokens 0 are padding, which the loss leaves out: so the sum is less by what they have.
    sources = torch.tensor([source])
    memory, before = model.memorise(sources), model.begin(1)
    first, before = model.step(torch.tensor([[BEGIN]]), before, memory)
    missing = first[0, 0, PADDING].exp().item()
    for token in range(1, SHAPE.vocabulary):
        second, _ = model.step(torch.tensor([[token]]), before, memory)
        missing += (first[0, 0, token] + second[0, 0, PADDING]).exp().item()
    assert total + missing == pytest.approx(1, abs=1e-4)


def test_one_step_at_a_time_is_the_same(model: Transformer) -> None:
    sources = padded([[4, 5, 6, END], [7, END]])
    targets = torch.tensor([[[3, 8, 4], [5, 5, 6]], [[6, 7, 8], [8, 3, 3]]])
    memory, before = model.memorise(sources), model.begin(4)
    newest = torch.full((2, 2), BEGIN)
    scores = torch.zeros(2, 2)
    for place in range(3):
        log_probs, before = model.step(newest, before, memory)
        newest = targets[:, :, place]
        scores += log_probs.gather(2, newest[:, :, None]).squeeze(2)
    for row, text in itertools.product(range(2), repeat=2):
        source = sources[row][sources[row] != PADDING].tolist()
        wanted = log_prob(model, source, targets[row, text].tolist())
        assert scores[row, text].item() == pytest.approx(wanted, abs=1e-3)


def test_it_copies_tokens_that_the_vocabulary_makes_unlikely(model: Transformer) -> None:
    model.gate.bias.fill_(-20.0)  # always copy
    model.gate.weight.zero_()
    sources = torch.tensor([[4, 5, 5, END]])
    log_probs, _ = model.step(torch.tensor([[BEGIN]]), model.begin(1), model.memorise(sources))
    likely = log_probs.exp()[0, 0]
    assert likely[[4, 5, END]].sum().item() == pytest.approx(1, abs=1e-4)


def test_it_learns_to_copy_what_it_has_not_seen() -> None:
    torch.manual_seed(0)
    model = Transformer(Shape(vocabulary=9, width=32, heads=2, encoders=1, decoders=1, dropout=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rows = torch.randint(SPECIAL, 9, (400, 3))
    ends = torch.full((400, 1), END)
    sources = torch.cat([rows, ends], dim=1)
    targets = torch.cat([torch.full((400, 1), BEGIN), sources], dim=1)
    for step in range(70):
        chosen = torch.arange(40) + step % 9 * 40
        optimizer.zero_grad()
        model(sources[chosen], targets[chosen]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        written = write(model.eval(), sources[360:], beams=3, longest=8)
    assert (written[:, :4] == sources[360:]).all(dim=1).float().mean() > 0.8


def test_positions() -> None:
    table = positions_of(50, 8)
    assert table.shape == (50, 8)
    assert table[:20].equal(positions_of(20, 8))
    assert len(set(map(tuple, table.tolist()))) == 50


# Beam search.


def exhaustive(model: Transformer, source: list[int], longest: int) -> tuple[float, list[int]]:
    """The best of all texts, by mean log-probability."""
    words = [token for token in range(SHAPE.vocabulary) if token not in (PADDING, BEGIN, END)]
    texts = [
        [*text, END]
        for length in range(longest)
        for text in itertools.product(words, repeat=length)
    ]
    targets = padded([[BEGIN, *text] for text in texts])
    sources = torch.tensor([source]).expand(len(texts), -1)
    scores = -model(sources, targets) / torch.tensor([len(text) for text in texts])
    return max(zip(scores.tolist(), texts, strict=True))


def test_beam_search_against_exhaustive_search(model: Transformer) -> None:
    sources = [[4, 5, 6, END], [7, END], [3, 3, END]]
    found = write(model, padded(sources), beams=300, longest=4)  # as many as there can be texts
    for row, source in zip(found.tolist(), sources, strict=True):
        score, best = exhaustive(model, source, 4)
        text = row[: row.index(END) + 1]
        assert text == best, (score, log_prob(model, source, text) / len(text))
        assert set(row[len(text) :]) <= {PADDING}


def test_one_beam_is_greedy(model: Transformer) -> None:
    source = [4, 5, 6, END]
    (found,) = write(model, torch.tensor([source]), beams=1, longest=5).tolist()
    text: list[int] = []
    while len(text) < 4 and text[-1:] != [END]:
        scores = {token: log_prob(model, source, [*text, token]) for token in range(2, 9)}
        text.append(max(scores, key=lambda token: scores[token]))
    assert found == ([*text, END] if text[-1] != END else text)


def test_a_beam_that_has_ended_keeps_its_place() -> None:
    """The end is likely at once; a longer text is more likely per token only in the end."""
    steps = iter([[0.0, 0, 0.5, 0.5], [0, 0, 0.1, 0.9], [0, 0, 0.99, 0.01]])

    def step(newest: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        return torch.tensor(next(steps)).log().expand(*newest.shape, 4)

    found = beam_search(step, rows=2, beams=2, longest=3)
    assert found.tolist() == [[3, 3, END]] * 2  # (0.5 · 0.9 · 0.99) ** (1/3) > 0.5


def test_a_text_ends_where_it_must() -> None:
    def step(newest: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.0, 0.0, 1e-6, 1 - 1e-6]).log().expand(*newest.shape, 4)

    assert beam_search(step, rows=1, beams=2, longest=4).tolist() == [[3, 3, 3, END]]


# Scores and baselines.


def test_rouge_by_hand() -> None:
    found = rouge(["The cat sat, on the mat"], ["the cat was on the mat"])
    assert found == {
        "rouge1": pytest.approx(10 / 12),
        "rouge2": pytest.approx(6 / 10),
        "rougeL": pytest.approx(10 / 12),
    }
    assert rouge(["b a"], ["a b"])["rougeL"] == pytest.approx(0.5)
    assert rouge(["", "a"], ["a", ""]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
    assert rouge(["a a a"], ["a"])["rouge1"] == pytest.approx(0.5)  # counted once


def test_the_nearest_text() -> None:
    known = Neighbours(["a tool for maps", "a tool for music", "the the the", "a a a tool"])
    assert known.nearest("Music, a tool?") == 1
    assert known.nearest("maps") == 0
    assert known.nearest("nothing of this") == 0
