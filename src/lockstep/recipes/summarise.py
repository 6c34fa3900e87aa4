"""Recipe `summarise`: the one-line synopsis of a Debian package from its description.

The model is a small transformer with a copy mechanism, since a synopsis takes most of its words
from the description. 500 descriptions are held out, and scored by ROUGE. `docs/applications.md`
reports scores and times.
"""

from __future__ import annotations

from typing import Any

from lockstep.job.job import Job
from lockstep.recipes import texts
from lockstep.recipes.datasets import load_synopses
from lockstep.recipes.datasets.text_pairs import Split, read_pairs, split_pairs
from lockstep.recipes.text.rewriting import Rewriting, Settings
from lockstep.recipes.text.rouge import rouge

BATCH_SIZE = 64
LONGEST = (80, 26)
"""Most tokens of a description and of a synopsis."""


def summarise(
    data: str | None = None, epochs: float = 3, width: int = 192, vocabulary: int = 6000
) -> Job:
    """Summarise texts.

    Args:
        data: Pairs, as `lockstep.recipes.datasets.text_pairs.read_pairs` reads them: TSV or
            CSV with the columns source (a text) and target (its summary), or JSONL. None: Debian's
            descriptions.
        epochs: Passes over the data; the learning rate falls to 0 by their end.
        width: Width of the transformer.
        vocabulary: Number of subwords.
    """
    texts(data=data)
    settings = Settings(
        epochs=epochs, batch_size=BATCH_SIZE, rate=1.5e-3, vocabulary=vocabulary, width=width,
        encoders=2, decoders=2, longest=LONGEST, dropout=0.0,  # it sees each pair a few times only
    )  # fmt: skip
    return Job(
        task=Summarise(settings, data), batch_size=BATCH_SIZE, eval_batch_size=50,
        data_epochs=epochs, clip_grad_norm=1.0, precision="bf16",
    )  # fmt: skip


class Summarise(Rewriting):
    """Task of the recipe `summarise`."""

    def __init__(self, settings: Settings, data: str | None = None) -> None:
        super().__init__(settings)
        self.data = data

    def read_split(self) -> Split:
        """All pairs."""
        pairs = load_synopses() if self.data is None else read_pairs(self.data)
        return split_pairs(pairs, self.data or "synopses")

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        """Mean ROUGE-1, ROUGE-2 and ROUGE-L of the held-out summaries."""
        return rouge(outputs["texts"], [target for _, target in self.split.held_out])

    def baseline(self) -> dict[str, float]:
        """ROUGE of the first words of the source, as many as a summary has on average."""
        lengths = [len(target.split()) for _, target in self.split.train]
        count = round(sum(lengths) / len(lengths))
        return self.score(
            {"texts": [" ".join(source.split()[:count]) for source, _ in self.split.held_out]}
        )
