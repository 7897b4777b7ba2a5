"""Quantities with units, as people write them in a plan: `10 min`, `0.5 mm`.

A bare number is an error: 600 may be seconds to one reader and milliseconds to another.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_MILLIMETRES = {"mm": 1.0, "cm": 10.0}
_QUANTITY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-zµ]+)\s*$")


def _parse(value: object, units: dict[str, float], example: str) -> float:
    match = _QUANTITY.match(value) if isinstance(value, str) else None
    known = ", ".join(units)
    if match is None:
        raise ValueError(f"{value!r} needs a number and a unit ({known}), for example '{example}'")
    number, unit = match.groups()
    if unit not in units:
        raise ValueError(f"'{unit}' is not a unit that fits here (use {known}), for example '{example}'")
    return float(number) * units[unit]


def seconds(value: object) -> float:
    """Parses a duration such as '90 s', '10 min' or '2 h' into seconds; raises ValueError."""
    return _parse(value, _SECONDS, "10 min")


def millimetres(value: object) -> float:
    """Parses a length such as '0.5 mm' or '1 cm' into millimetres; raises ValueError."""
    return _parse(value, _MILLIMETRES, "0.5 mm")


def _schema(units: dict[str, float], example: str) -> WithJsonSchema:
    pattern = rf"^\s*\d+(\.\d+)?\s*({'|'.join(units)})\s*$"
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


#: A duration in seconds, written with its unit.
Seconds = Annotated[
    float,
    BeforeValidator(seconds),
    PlainSerializer(lambda value: f"{value:g} s", return_type=str),
    _schema(_SECONDS, "10 min"),
]
#: A length in millimetres, written with its unit.
Millimetres = Annotated[
    float,
    BeforeValidator(millimetres),
    PlainSerializer(lambda value: f"{value:g} mm", return_type=str),
    _schema(_MILLIMETRES, "0.5 mm"),
]
