"""Templates to pages and cards: HTML, where every value is escaped, and Markdown, where nothing of a value is markup.

A template is named `PACKAGE/FILE`, so that those of one package can extend those of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup


def html(template: str, context: Mapping[str, Any]) -> bytes:
    """A page from a template."""
    environment = Environment(
        loader=FunctionLoader(_source), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(context).encode()


def markdown(template: str, context: Mapping[str, Any]) -> bytes:
    """A Markdown document from a template."""
    environment = Environment(  # noqa: S701 (Markdown: `finalize` escapes every value)
        loader=FunctionLoader(_source), finalize=as_markdown, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=StrictUndefined,
    )  # fmt: skip
    return environment.get_template(template).render(context).encode()


def as_markdown(value: object) -> str:
    """A value as Markdown text: nothing of it is read as markup, and it stays on its line."""
    if isinstance(value, Markup):
        return str(value)
    text = re.sub(r"\s+", " ", str(value))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)


def _source(name: str) -> str:
    package, _, file = name.partition("/")
    return (files(package) / file).read_text(encoding="utf-8")
