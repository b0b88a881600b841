"""Builds what the documentation site has beyond its written pages: references made from the code.

    reference/job-file.md   every key of a job file: type, bounds, default, meaning, from its models
    reference/commands.md   every command with its options, from the command line itself
    reference/api.md        the Python API, by mkdocstrings

mkdocs calls the two functions at the end (`hooks:` in mkdocs.yml). Links that leave `docs/` are
shown as paths, for the site has no copy of the repository.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import click
import typer
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedark.cli import app
from fedark.contract.job import JobFile

_API = """\
# Python API

::: fedark
    options:
      members_order: source
      show_root_heading: false
      show_source: false
"""
_RELATIVE = re.compile(r"\[([^\]]+)\]\((\.\./[^)]+)\)")


def _type(kind: Any) -> str:
    """A type in the words of a job file."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(f'`"{one}"`' for one in inner)
    if origin is tuple:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "table"
    if inner:  # a union
        return " or ".join(_type(one) for one in inner if one is not type(None))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "table"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        getattr(kind, "__name__", ""), str(kind)
    )


def _bounds(field: FieldInfo) -> str:
    """The bounds of a number or of a length, as inequalities."""
    said = []
    for part in field.metadata:
        match part:
            case Ge(bound):
                said.append(f"≥ {bound}")
            case Gt(bound):
                said.append(f"> {bound}")
            case Le(bound):
                said.append(f"≤ {bound}")
            case Lt(bound):
                said.append(f"< {bound}")
            case MinLen(bound):
                said.append(f"at least {bound}")
            case MaxLen(bound):
                said.append(f"at most {bound}")
            case _ if getattr(part, "pattern", None):
                said.append(f"matches `{part.pattern}`".replace("|", "\\|"))
    return ", ".join(said)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or value == () or value == {}:
        return ""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return f"`{text}`"


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a class and its bases say of their attributes."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        text = re.sub(r"\n {8,}", " ", (inspect.getdoc(kind) or "").partition("Attributes:")[2])
        for names, meaning in re.findall(r"^ {4}([a-z_, 0-9]+): (.*)$", text, re.MULTILINE):
            found |= {name.strip(): meaning.strip() for name in names.split(",")}
    return found


def _tables(kind: Any) -> Iterator[type[BaseModel]]:
    """The models that a type holds."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for inner in get_args(kind):
        yield from _tables(inner)


def _section(path: str, model: type[BaseModel], listed: bool) -> Iterator[str]:
    lead = re.sub(r"\s+", " ", (model.__doc__ or "").partition("Attributes:")[0]).strip()
    yield f"## `{f'[[{path}]]' if listed else f'[{path}]'}`\n\n{lead}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    meanings, below = _meanings(model), []
    for name, field in model.model_fields.items():
        key, inner = field.alias or name, list(_tables(field.annotation))
        if inner:
            below.append((f"{path}.{key}", inner[0], get_origin(field.annotation) is tuple))
            continue
        kind = ", ".join(part for part in (_type(field.annotation), _bounds(field)) if part)
        meaning = meanings.get(name, "").replace("|", "\\|")
        yield f"| `{key}` | {kind} | {_default(field)} | {meaning} |"
    yield ""
    for deeper in below:
        yield from _section(*deeper)


def job_file() -> str:
    """The reference of the job file."""
    parts = [
        "# Reference: the job file",
        "",
        "Made from the models that check a job file. [The job file](../job-file.md) explains it.",
        "",
    ]
    for name, field in JobFile.model_fields.items():
        listed = get_origin(field.annotation) is tuple
        parts += _section(name, next(_tables(field.annotation)), listed)
    return "\n".join(parts)


def commands() -> str:
    """The reference of the command line."""

    def walk(command: click.Command, path: str) -> Iterator[str]:
        below = getattr(command, "commands", {})
        for name, inner in sorted(below.items()):
            yield from walk(inner, f"{path} {name}")
        if below:
            return
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        names = " ".join(one.make_metavar(click.Context(command)) for one in arguments)
        yield f"## {path}\n\n`{path} {names}`\n\n{inspect.cleandoc(command.help or '')}\n"
        yield "| option | default | meaning |\n|---|---|---|"
        for one in command.params:
            if isinstance(one, click.Option) and one.name != "help":
                default = "" if one.default in (None, "", False) or one.multiple else one.default
                flags = ", ".join(f"`{flag}`" for flag in one.opts)
                meaning = (one.help or "").replace("|", "\\|")
                yield f"| {flags} | {f'`{default}`' if default != '' else ''} | {meaning} |"
        yield ""

    group = typer.main.get_command(app)
    return "\n".join(["# Reference: the commands", "", *walk(group, "fedark")])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (mkdocs hook)."""
    pages = {"job-file": job_file(), "commands": commands(), "api": _API}
    for name, content in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Show a link to a file outside `docs/` as that file's path (mkdocs hook)."""
    out_of_docs = "../" * (page.file.src_uri.count("/") + 1)
    return _RELATIVE.sub(
        lambda link: f"`{link[2].lstrip('./')}`" if link[2].startswith(out_of_docs) else link[0],
        markdown,
    )
