"""Cuts: which modules of a model are cut and how, and the reason for each that is not.

A linear layer by itself is cut by columns: outputs are joined, which is always right. One that
follows it with only elementwise functions between is cut by rows: what lies between is computed
slice by slice. That is done where the structure proves it: in `nn.Sequential`, and in torch's own
transformer layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lockstep.errors import JobError
from lockstep.job.slice_words import COLUMN_WORDS, HEADS, ROW_WORDS
from lockstep.slices.structure import (
    is_elementwise,
    obstacle,
    parameter_obstacle,
    sequential_chains,
)
from lockstep.slices.summing import sizes_of
from lockstep.slices.words import Words

Kind = Literal["", "column", "row", "heads", "width"]

LEAST = 8
"""Columns or rows of a slice, at least, where nobody asks for a cut: less is not worth a call."""
_DIMS = {"column": 0, "row": 1, "width": 1}
"""Along which dimension of the matrix."""
Use = tuple[str, str]
"""A module's name, and the name of its parameter."""
_OWN = {
    nn.Linear: frozenset({"weight", "bias"}),
    nn.Embedding: frozenset({"weight"}),
    nn.MultiheadAttention: frozenset({
        "in_proj_weight", "in_proj_bias", "out_proj",
        "q_proj_weight", "k_proj_weight", "v_proj_weight",
    }),
}  # fmt: skip
FEED_FORWARD = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Whose `linear1`, `activation`, `dropout` and `linear2` are run one after the other."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What becomes of a module that has matrices."""

    module: str
    """Its name in the model; "" is the model itself."""
    kind: Kind
    """"": it is not cut."""
    pieces: tuple[int, ...]
    """The sizes of the slices: columns, rows or heads."""
    elements: int
    """Of its matrices."""
    reason: str

    def to_message(self) -> dict[str, Any]:
        """JSON-ready: a row of the table."""
        return {
            "module": self.module,
            "cut": self.kind or None,
            "pieces": list(self.pieces),
            "elements": self.elements,
            "reason": self.reason,
        }


def choose_cuts(
    model: nn.Module, slices: int, words: Words, refused: Mapping[str, str]
) -> list[Cut]:
    """What becomes of each module with matrices, in the model's order.

    `refused`: parameters that must stay whole, by name, and why.

    Raises:
        JobError: the job's own words cut a tied weight in two ways.
    """
    chooser = _Chooser(model, slices, words, refused)
    return chooser.choose()


class _Chooser:
    def __init__(
        self, model: nn.Module, slices: int, words: Words, refused: Mapping[str, str]
    ) -> None:
        self.slices, self.words = slices, words
        self.modules = _with_matrices(model)
        self.model = model
        self.kinds: dict[str, Kind] = {}
        self.reasons: dict[str, str] = {}
        """Of cuts, and of what is not cut."""
        self.refused = {id(model.get_parameter(name)): why for name, why in refused.items()}
        self.tied = _tied(model)

    def choose(self) -> list[Cut]:
        for name, module in self.modules.items():
            why = self._obstacle(module)
            if why:
                self.reasons[name] = why
            else:
                self._by_word(name, module)
        self._tie_to_embeddings()
        for first, second in self._chains():
            self._chain(first, second)
        for name in self._undecided():
            self._alone(name)
        self._check_tied()
        return [self._cut(name, module) for name, module in self.modules.items()]

    def _undecided(self) -> list[str]:
        return [name for name in self.modules if name not in self.reasons]

    def _obstacle(self, module: nn.Module) -> str:
        why = obstacle(module, tuple(_OWN), _OWN.get(type(module), frozenset()))
        if why:
            return why
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            return "max_norm changes its rows as wholes"
        if isinstance(module, nn.MultiheadAttention):
            if not module._qkv_same_embed_dim:
                return "its keys and values have widths of their own"
            if module.add_zero_attn:
                return "add_zero_attn adds a key that belongs to no slice"
        for name, parameter in _parameters(module):
            why = self.refused.get(id(parameter), "") or parameter_obstacle(parameter)
            if why:
                return f"{name}: {why}"
        return ""

    def _by_word(self, name: str, module: nn.Module) -> None:
        """What the job, or the model's configuration, says."""
        word = self.words.by_module.get(name)
        if word is None:
            if self.words.only:
                self.reasons[name] = "slice_plan does not name it"
            elif not isinstance(module, nn.Linear):
                kind: Kind = "heads" if isinstance(module, nn.MultiheadAttention) else "width"
                self._decide(name, kind, "", LEAST if kind == "width" else 1)
            return
        said = f"{word}, as slice_plan says" if self.words.only else f"{word}, as its config says"
        kind = _kind_of(word, module)
        if kind:
            self._decide(name, kind, said, 1)
        else:
            self.reasons[name] = f"{said}: no cut of {type(module).__name__}"

    def _decide(self, name: str, kind: Kind, why: str, least: int) -> None:
        """Cut a module so, if it is large enough."""
        length = _length(self.modules[name], kind)
        if length < least * self.slices:
            unit = {"heads": "heads", "row": "rows"}.get(kind, "columns")
            wanted = f"{self.slices} slices" + (f" of {least}" if least > 1 else "")
            self.reasons[name] = f"{length} {unit} are too few for {wanted}"
            return
        self.kinds[name], self.reasons[name] = kind, why or _WHY[kind]

    def _tie_to_embeddings(self) -> None:
        """A linear layer that has an embedding's table takes it as that is cut."""
        for uses in self.tied:
            if any(self.kinds.get(name) == "width" for name, _ in uses):
                for name, _ in uses:
                    if name in self.modules and name not in self.reasons:
                        self._decide(name, "row", "its weight is that of an embedding", 1)

    def _chains(self) -> Iterable[tuple[str, str]]:
        names = {id(module): name for name, module in self.modules.items()}

        def fits(first: nn.Module, second: nn.Module) -> bool:
            one, other = names.get(id(first), "?"), names.get(id(second), "?")
            return self._may_chain(one, other)

        for module in self.model.modules():
            if "forward" in vars(module):
                continue
            if type(module) is nn.Sequential:
                for first, second in sequential_chains(module, fits):
                    yield names[id(first)], names[id(second)]
            elif feeds_forward(module):
                first = module.get_submodule("linear1")
                second = module.get_submodule("linear2")
                if fits(first, second):
                    yield names[id(first)], names[id(second)]

    def _may_chain(self, first: str, second: str) -> bool:
        """Whether two layers are, or may be, cut by columns and by rows."""
        if not {first, second} <= self.modules.keys() or first == second:
            return False
        one, other = self.modules[first], self.modules[second]
        if not isinstance(one, nn.Linear) or not isinstance(other, nn.Linear):
            return False
        if one.out_features != other.in_features:
            return False
        if first in self.reasons or second in self.reasons:
            return self.kinds.get(first) == "column" and self.kinds.get(second) == "row"
        tied = {name for uses in self.tied for name, _ in uses}
        return one.out_features >= LEAST * self.slices and not tied & {first, second}

    def _chain(self, first: str, second: str) -> None:
        for name, kind, why in (
            (first, "column", f"chain: {second} takes its slices as they are"),
            (second, "row", f"chain: takes the slices of {first} as they are"),
        ):
            said = f"{self.reasons[name]}; " if name in self.reasons else ""
            self.kinds[name], self.reasons[name] = kind, said + why  # type: ignore[assignment]

    def _alone(self, name: str) -> None:
        module = self.modules[name]
        assert isinstance(module, nn.Linear)
        wide = module.out_features >= LEAST * self.slices
        long = module.in_features >= LEAST * self.slices
        self._decide(name, "row" if long and not wide else "column", "", LEAST)

    def _check_tied(self) -> None:
        """See that what is tied is cut once, the same way; else it stays whole, and so does what is
        tied to that."""
        if self.words.only:
            self._check_words()
        while uses := next(filter(self._at_odds, self.tied), None):
            for name, parameter in uses:
                if self._way(name, parameter):
                    del self.kinds[name]
                    others = ", ".join(sorted({other for other, _ in uses} - {name}))
                    self.reasons[name] = (
                        f"its {parameter} is that of {others} too, not cut like this"
                    )

    def _at_odds(self, uses: Sequence[Use]) -> bool:
        return len({self._way(*use) for use in uses}) > 1

    def _way(self, name: str, parameter: str) -> str:
        """How a module's parameter is cut; "": it stays whole."""
        kind = self.kinds.get(name, "")
        if kind == "heads":
            heads = _length(self.modules[name], kind)
            return "" if parameter == "out_proj.bias" else f"{heads} heads of {parameter}"
        if not kind or (kind == "row" and parameter == "bias"):
            return ""
        return str(_DIMS[kind])

    def _check_words(self) -> None:
        """Refuse a job's own words for a tied weight that contradict each other."""
        for uses in self.tied:
            cut = {name: self._way(name, parameter) for name, parameter in uses}
            if len({way for way in cut.values() if way}) > 1:
                raise JobError(
                    "slice_plan cuts a tied weight in two ways",
                    expected=f"one cut of the weight that {' and '.join(cut)} share",
                    found=", ".join(
                        f"{name}: {self.words.by_module[name]}" for name, way in cut.items() if way
                    ),
                    fix="name one of them alone, and it stays whole; or cut them alike: a linear "
                    "layer rowwise goes with an embedding colwise",
                )

    def _cut(self, name: str, module: nn.Module) -> Cut:
        kind = self.kinds.get(name, "")
        return Cut(
            module=name,
            kind=kind,
            pieces=sizes_of(_length(module, kind), self.slices) if kind else (),
            elements=sum(p.numel() for _, p in _parameters(module) if p.ndim > 1),
            reason=self.reasons[name],
        )


_WHY: dict[Kind, str] = {
    "column": "alone: its outputs are joined",
    "row": "alone: partial outputs are summed, since it has more rows than columns",
    "heads": "by heads",
    "width": "by width",
}


def feeds_forward(module: nn.Module) -> bool:
    """Whether a module is one of torch's own transformer layers, whose feed-forward part runs one
    linear layer, elementwise functions, and another."""
    return (
        type(module) in FEED_FORWARD
        and not {"forward", "_ff_block"} & vars(module).keys()
        and is_elementwise(module.activation)
        and is_elementwise(module.dropout)
    )


def _with_matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have matrices of their own; an attention with its output's."""
    parts = {
        id(module.out_proj) for module in model.modules() if type(module) is nn.MultiheadAttention
    }
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) not in parts and any(p.ndim > 1 for _, p in _parameters(module))
    }


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """A module's own parameters; of an attention, with those of its output."""
    recurse = type(module) is nn.MultiheadAttention
    return list(module.named_parameters(recurse=recurse))


def _tied(model: nn.Module) -> list[list[Use]]:
    """The parameters that several modules share: of each, who uses it."""
    users: dict[int, list[Use]] = {}
    outputs = {
        f"{name}.out_proj".removeprefix("."): name
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
    }
    for name, module in model.named_modules():
        for parameter, value in module._parameters.items():
            if value is not None:
                inside = name in outputs
                use = (outputs[name], f"out_proj.{parameter}") if inside else (name, parameter)
                users.setdefault(id(value), []).append(use)
    return [uses for uses in users.values() if len(uses) > 1]


def _kind_of(word: str, module: nn.Module) -> Kind:
    if isinstance(module, nn.Linear):
        return "column" if word in COLUMN_WORDS else "row" if word in ROW_WORDS else ""
    if isinstance(module, nn.Embedding):
        return "width" if word in COLUMN_WORDS else ""
    return "heads" if word == HEADS else ""


def _length(module: nn.Module, kind: Kind) -> int:
    attribute = {
        "column": "out_features", "row": "in_features", "heads": "num_heads",
        "width": "embedding_dim",
    }[kind]  # fmt: skip
    return int(getattr(module, attribute))
