"""Checked settings: frozen dataclasses that refuse what makes no sense in one plain line, whoever makes them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Strict, Tag, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from fastssl.utils.yaml_file import shown

Checked = TypeVar("Checked", bound=type)


def _number(value: object) -> object:
    """Yaml reads 1e-4 (no dot) as a string; a whole number may be larger than any float."""
    try:
        return float(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else value
    except (ValueError, OverflowError):
        return value


# Strict: True is a whole number to Python, "64" and 2.0 are to pydantic.
Switch = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[Whole, Field(ge=1)]
Natural = Annotated[Whole, Field(ge=0)]
Real = Annotated[float, Strict(), BeforeValidator(_number)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Share = Annotated[Real, Field(ge=0, le=1)]
BelowOne = Annotated[Real, Field(ge=0, lt=1)]
# Of text, as 1 would equal True.
AutoSwitch = Annotated[Literal["auto", True, False], BeforeValidator(lambda x: x if isinstance(x, bool) else str(x))]

#: For a union of a list and a mapping: the value's form says which is meant. The names stand in pydantic's places of
#: mistakes, and are no part of a key.
_KINDS = ("(list)", "(mapping)", "(number)", "(word)")
LIST, MAPPING, _NUMBER, _WORD = map(Tag, _KINDS)
BY_FORM = Discriminator(lambda value: _KINDS[not isinstance(value, list)])
CountOrAuto = Annotated[
    Annotated[Count, _NUMBER] | Annotated[Literal["auto"], _WORD],
    Discriminator(lambda value: _KINDS[2 + isinstance(value, str)]),
]

#: pydantic's kinds of mistakes -> what the key must be; by the names of pydantic's documentation
_WORDS = {
    **dict.fromkeys(("dataclass_type", "dataclass_exact_type", "dict_type"), "must be a mapping of keys to values"),
    **dict.fromkeys(("list_type", "tuple_type"), "must be a list"),
    "too_long": "must be a list of {max_length} values",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    **dict.fromkeys(("float_type", "finite_number"), "must be a finite number"),
    "literal_error": "must be {expected}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
}
_UNKNOWN = "unexpected_keyword_argument"


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(section: str = "", error: type[Exception] = ValueError) -> Callable[[Checked], Checked]:
    """Make a class a frozen dataclass whose values pydantic checks. A mistake raises ``error`` with one line that says
    the key, which the recipe's ``section`` opens, what it must be and what it is. What several values must be together
    ``__post_init__`` checks; the message of its ``ValueError`` begins with a field's name.
    """

    def checked(kind: Checked) -> Checked:
        made: Any = dataclass(kind, frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
        make, signature = made.__init__, inspect.signature(made)

        @functools.wraps(make)
        def init(self: Any, *args: Any, **values: Any) -> None:
            named = signature.bind(*args, **values).arguments  # TypeError, as of any call
            try:
                make(self, **named)
            except ValidationError as mistakes:
                raise error(in_words(mistakes, section)[0]) from None

        made.__init__ = init
        result: Checked = made
        return result

    return checked


def in_words(mistakes: ValidationError, section: str = "") -> tuple[str, dict[str, Any]]:
    """What is wrong, in one line: the whole key, what it must be, and what it is. Beside it the key that does not exist
    with its value, if that is what is wrong.
    """
    # A key that does not exist comes before any other: it may be why another is missing.
    mistake = min(
        mistakes.errors(include_url=False), key=lambda one: (one["type"] != _UNKNOWN, one["type"].startswith("missing"))
    )
    kind, about, value = mistake["type"], mistake.get("ctx", {}), mistake["input"]
    key = ".".join([section] * bool(section) + [str(part) for part in mistake["loc"] if part not in _KINDS])
    if kind == _UNKNOWN:
        return f"no key {key}", {key: value}
    if kind == "value_error":
        return f"{key}.{about['error']}" if key else str(about["error"]), {}
    if kind.startswith("missing"):
        return f"{key} is missing", {}
    return f"{key} {_WORDS.get(kind, mistake['msg']).format(**about)}, got {shown(value)}", {}
