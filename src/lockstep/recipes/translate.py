"""Recipe `translate`: English to German, by a small transformer with a copy mechanism.

The data are synopses and paragraphs of at most 20 words from Debian's package descriptions, 500 of
them held out, scored by BLEU and chrF. The vocabulary is learned from the training texts.
`docs/applications.md` reports scores and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.recipes import at_least, texts
from lockstep.recipes.datasets import load_translations
from lockstep.recipes.datasets.text_pairs import Split, read_pairs, split_pairs
from lockstep.recipes.text.neighbours import Neighbours
from lockstep.recipes.text.rewriting import Rewriting, Settings

BATCH_SIZE = 64
LONGEST = (64, 64)
"""Most tokens of a source and of a target."""


def translate(
    data: str | None = None, epochs: float = 8, width: int = 192, vocabulary: int = 4000,
    words: int = 20,
) -> Job:  # fmt: skip
    """Translate texts.

    Args:
        data: Pairs, as `lockstep.recipes.datasets.text_pairs.read_pairs` reads them: TSV or
            CSV with the columns source and target, or JSONL. None: Debian's descriptions, English
            to German.
        epochs: Passes over the data; the learning rate falls to 0 by their end.
        width: Width of the transformer.
        vocabulary: Number of subwords, of both languages together.
        words: Most words of a source; pairs with longer sources are left out.
    """
    texts(data=data)
    at_least(1, words=words)
    settings = Settings(
        epochs=epochs, batch_size=BATCH_SIZE, rate=1.5e-3, vocabulary=vocabulary, width=width,
        encoders=3, decoders=3, longest=LONGEST,
    )  # fmt: skip
    return Job(
        task=Translate(settings, data, words), batch_size=BATCH_SIZE, eval_batch_size=50,
        data_epochs=epochs, clip_grad_norm=1.0, precision="bf16",
    )  # fmt: skip


class Translate(Rewriting):
    """Task of the recipe `translate`."""

    def __init__(self, settings: Settings, data: str | None = None, words: int = 20) -> None:
        super().__init__(settings)
        self.data, self.words = data, words

    def read_split(self) -> Split:
        """The pairs whose sources are short enough."""
        pairs = load_translations() if self.data is None else read_pairs(self.data)
        short = (pair for pair in pairs if len(pair[0].split()) <= self.words)
        name = self.data or "translations"
        return split_pairs(short, f"the sources of at most {self.words} words of {name}")

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        """Corpus BLEU and chrF of all held-out translations, 0 to 100."""
        return compare(outputs["texts"], [target for _, target in self.split.held_out])

    def baseline(self) -> dict[str, float]:
        """The better of copying the source and of taking the most similar pair's target."""
        scores = [self.score({"texts": texts}) for texts in (self.copied(), self.nearest())]
        return {name: max(score[name] for score in scores) for name in scores[0]}

    def copied(self) -> list[str]:
        """The held-out sources as they are."""
        return [source for source, _ in self.split.held_out]

    def nearest(self) -> list[str]:
        """For each held-out source, the target of the most similar training source."""
        known = Neighbours([source for source, _ in self.split.train])
        return [self.split.train[known.nearest(source)][1] for source in self.copied()]


def compare(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """BLEU and chrF of texts, by sacrebleu.

    Raises:
        JobError: the package sacrebleu is missing.
    """
    try:
        import sacrebleu
    except ImportError:
        raise JobError(
            "translations are scored by BLEU and chrF",
            expected="the package sacrebleu",
            found="no such package",
            fix="pip install 'lockstep-dlp[text]'",
        ) from None
    return {
        "bleu": sacrebleu.corpus_bleu(texts, [wanted]).score,
        "chrf": sacrebleu.corpus_chrf(texts, [wanted]).score,
    }
