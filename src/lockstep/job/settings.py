"""Settings: dataclass fields that carry their own limits and explanation.

A setting is declared once, as a field of `Job`: its type by the annotation, the rest by
`setting(...)`. Derived from that are the checks of its values, the command line's options, the
tables of docs/job-files.md, and which settings belong to the identity of a run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lockstep.errors import JobError

KEY = "lockstep.setting"
"""Where a field's metadata holds the declaration."""


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a field says of its setting, besides type and default; see `setting`."""

    help: str
    changes_numbers: bool
    least: float | None = None
    most: float | None = None
    above: float | None = None
    detail: str = ""
    unset: str = ""
    expected: str = ""
    options: tuple[str, ...] | None = ()


def setting(
    default: Any,
    *,
    help: str,
    changes_numbers: bool = False,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    detail: str = "",
    unset: str = "",
    expected: str = "",
    options: tuple[str, ...] | None = (),
) -> Any:
    """A dataclass field that is a setting. Its choices are those of a `Literal` annotation.

    Args:
        default: the value of a setting that is not given.
        help: one sentence for the command line and the documentation. Other settings' names are
            in backticks.
        changes_numbers: whether the results depend on the setting, bit for bit.
        least: the smallest value; infinity and NaN are refused then.
        most: the largest value.
        above: what a value has to exceed.
        detail: more sentences, in Markdown, for the documentation.
        unset: what the default None means.
        expected: what a value is, for an error's message, where the type says too little.
        options: the names of the command line's option, where they do not follow from the
            setting's name; None: there is no option.
    """
    declaration = Declaration(
        help=help, changes_numbers=changes_numbers, least=least, most=most, above=above,
        detail=detail, unset=unset, expected=expected, options=options,
    )  # fmt: skip
    return field(default=default, metadata={KEY: declaration})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The type of a setting's values."""

    expected: str
    """What a value is, for an error's message."""
    option: Any
    """The type of the command line's option."""
    convert: Callable[[Any], Any]
    """A value as it is kept, which JSON can hold. Raises TypeError: it is of another type."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Setting: one field's name, type, limits and explanation."""

    name: str
    kind: Kind
    choices: tuple[str, ...]
    """The values that there are; (): any."""
    optional: bool
    """Whether None is a value."""
    default: Any
    declared: Declaration

    def checked(self, value: Any) -> Any:
        """The value as it is kept: NumPy's numbers as Python's, a path as text.

        Raises:
            JobError: it has the wrong type, is out of range, or is none of the choices.
        """
        if value is None and self.optional:
            return None
        try:
            kept = self.kind.convert(value)
        except TypeError:
            expected = self.declared.expected or self.kind.expected
            raise JobError(
                f"{self.name} has the wrong type", expected=expected, found=repr(value)
            ) from None
        if self.choices and kept not in self.choices:
            raise JobError(
                f"{self.name} is not one of its values",
                expected=" or ".join(self.choices),
                found=repr(value),
            )
        if not self._in_range(kept):
            raise JobError(
                f"{self.name} is out of range", expected=self._range(), found=repr(value)
            )
        return kept

    def _in_range(self, value: Any) -> bool:
        least, most, above = self.declared.least, self.declared.most, self.declared.above
        return (
            (least is None or least <= value < math.inf)
            and (most is None or value <= most)
            and (above is None or value > above)
        )

    def _range(self) -> str:
        least, most, above = self.declared.least, self.declared.most, self.declared.above
        limits = (
            "" if above is None else f"a number above {above}",
            "" if least is None else f"at least {least}",
            "" if most is None else f"at most {most}",
        )
        return ", ".join(limit for limit in limits if limit)

    @property
    def default_text(self) -> str:
        """The default for people, in Markdown; "" if there is none."""
        if self.declared.unset or self.default in (None, ()):
            return self.declared.unset
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return f"`{self.default}`" if isinstance(self.default, str) else f"{self.default:g}"


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass, by name, in the order of its fields."""
    hints = get_type_hints(kind)
    found = {}
    for each in dataclasses.fields(kind):
        if KEY in each.metadata:
            hint = hints[each.name]
            parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
            found[each.name] = Setting(
                name=each.name,
                kind=_kind(parts),
                choices=get_args(parts[0]) if get_origin(parts[0]) is Literal else (),
                optional=types.NoneType in parts,
                default=each.default,
                declared=each.metadata[KEY],
            )
    return found


def _kind(hints: Sequence[Any]) -> Kind:
    """The kind of an annotation, given as the members of a union."""
    bases = [base for hint in hints if (base := get_origin(hint) or hint) in _KINDS]
    (base,) = [each for each in bases if each is not str] or [str]  # beside PathLike it is a path
    return _KINDS[base]


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError
    return int(value)


def _number(value: Any) -> int | float:
    """A whole number stays one: the digest of the manifest tells 1 from 1.0."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError
    return int(value) if isinstance(value, Integral) else float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _path(value: Any) -> str:
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _names(value: Any) -> tuple[str, ...]:
    names = isinstance(value, Sequence) and not isinstance(value, str)
    if not names or not all(isinstance(name, str) for name in value):
        raise TypeError
    return tuple(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError
    return value


_KINDS: dict[Any, Kind] = {
    int: Kind(expected="a whole number", option=int, convert=_whole),
    float: Kind(expected="a number", option=float, convert=_number),
    bool: Kind(expected="true or false", option=bool, convert=_flag),
    str: Kind(expected="a name", option=str, convert=_text),
    os.PathLike: Kind(expected="a str or a pathlib.Path", option=str, convert=_path),
    Sequence: Kind(expected="a list of names", option=list[str], convert=_names),
    Mapping: Kind(expected="a mapping", option=None, convert=_mapping),
    Literal: Kind(expected="a name", option=str, convert=lambda value: value),
}
