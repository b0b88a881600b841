"""Prompt templates: text with the names of columns in braces, such as "{desk} desk: {message}".

Anything may stand between the braces but a brace: `{Load [kW]}`, `{text.de}`, `{0}`. In the text a
brace is written twice. In a name, doubled braces stand for braces where they come in pairs,
`{a {{b}} c}`; any name at all can be written in double quotes as JSON has them, `{"a } b"}`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fedark.foundation.errors import InputError

__all__ = ["Template", "column"]


@dataclass(frozen=True, slots=True)
class Template:
    """A prompt template that was read.

    Attributes:
        texts: what stands before, between and after the columns: one more than these.
        columns: in their order; one may stand several times.
    """

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> Template:
        """Read a template.

        >>> Template.parse("{desk} {{desk}}: {Load [kW]}").columns
        ('desk', 'Load [kW]')

        Raises:
            InputError: a brace is not closed, a name is empty, or there is none.
        """
        texts, columns, text, at = [], [], "", 0
        while at < len(source):
            char = source[at]
            if source[at : at + 2] in ("{{", "}}"):
                text, at = text + char, at + 2
            elif char == "{":
                name, at = _name(source, at + 1)
                texts.append(text)
                columns.append(name)
                text = ""
            elif char == "}":
                raise _malformed()
            else:
                text, at = text + char, at + 1
        if not columns:
            raise InputError(
                "The prompt template names no column, so every prompt would be the same.",
                safe="The data was not read.",
                fix='Write it like "{text}".',
            )
        return cls((*texts, text), tuple(columns))

    def fill(self, values: Sequence[str]) -> str:
        """The prompt for these values of `columns`."""
        pairs = zip(self.texts, values, strict=False)
        return "".join(text + value for text, value in pairs) + self.texts[-1]


def column(name: str) -> str:
    """The template of one column alone, whatever its name."""
    return "{" + json.dumps(name, ensure_ascii=False) + "}"


def _name(source: str, at: int) -> tuple[str, int]:
    """The name that begins at `at`, and where the text goes on."""
    if source[at : at + 1] == '"':
        try:
            name, end = json.JSONDecoder().raw_decode(source, at)
        except ValueError:
            raise _malformed() from None
        if source[end : end + 1] != "}" or not name:
            raise _malformed()
        return name, end + 1
    name, opened = "", 0
    while at < len(source):
        pair = source[at : at + 2]
        if pair == "{{" or (pair == "}}" and opened):
            opened += 1 if pair == "{{" else -1
            name, at = name + pair[0], at + 2
        elif source[at] == "}" and name:
            return name, at + 1
        elif source[at] in "{}":
            break
        else:
            name, at = name + source[at], at + 1
    raise _malformed()


def _malformed() -> InputError:
    return InputError(
        "A prompt template may hold nothing in braces but the name of a column.",
        safe="The data was not read.",
        fix=(
            'Write it like "{text}"; a brace itself is written twice, and a name with a brace in'
            ' it in quotes, {"a } b"}.'
        ),
    )
