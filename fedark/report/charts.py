"""The pictures of the report page, as SVG that takes its colours from the page's style.

Matplotlib draws them with stand-in colours, which are then replaced by CSS variables, so that one
picture serves light and dark. Text stays text.
"""

from __future__ import annotations

import hashlib
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["bars", "curves", "dots", "sequence"]

_STAND_INS = {
    "#010101": "ink",
    "#020202": "pale",
    "#030303": "grid",
    "#040404": "one",
    "#050505": "two",
    "#060606": "three",
    "#070707": "four",
}
_INK, _PALE, _GRID, *SERIES = _STAND_INS
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedark",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "text.parse_math": False,
}


def dots(rows: Mapping[str, Sequence[tuple[str, float, float, float]]], label: str) -> Markup:
    """Points with intervals: row -> (series, value, low, high), percent."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(0.9 + 0.62 * len(rows))
        names: dict[str, Any] = {}
        for place, points in enumerate(rows.values()):
            for index, (name, value, low, high) in enumerate(points):
                at = -place + 0.2 * ((len(points) - 1) / 2 - index)
                names[name] = axes.errorbar(
                    value,
                    at,
                    xerr=[[value - low], [high - value]],
                    fmt="o",
                    color=SERIES[index % len(SERIES)],
                    capsize=3,
                )
        axes.set_yticks([-place for place in range(len(rows))], list(rows))
        axes.set_xlim(-2, 102)
        axes.set_ylim(0.6 - len(rows), 0.5)
        axes.set_xlabel("% right, with 95 % intervals")
        axes.grid(axis="x")
        return _svg(figure, names, label)


def curves(series: Mapping[str, Sequence[tuple[int, float]]], named: str, label: str) -> Markup:
    """One line a series, of (round, value). `named`: what the values are."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(2.6)
        names: dict[str, Any] = {}
        for index, (name, points) in enumerate(series.items()):
            rounds, values = zip(*points, strict=True)
            (names[name],) = axes.plot(
                rounds, values, marker="o", color=SERIES[index % len(SERIES)]
            )
        axes.set_xlabel("round")
        axes.set_ylabel(named)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        last = max(number for points in series.values() for number, _ in points)
        axes.set_xlim(-0.3 if _from_zero(series) else 0.7, last + 0.3)
        axes.grid(axis="y")
        return _svg(figure, names if len(names) > 1 else {}, label)


def bars(values: Mapping[str, float], named: str, label: str) -> Markup:
    """One bar a name. `named`: what the values are."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(0.6 + 0.3 * len(values))
        axes.barh([-place for place in range(len(values))], list(values.values()), color=SERIES[0])
        axes.set_yticks([-place for place in range(len(values))], list(values))
        axes.set_xlabel(named)
        axes.grid(axis="x")
        return _svg(figure, {}, label)


def _from_zero(series: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    return any(number == 0 for points in series.values() for number, _ in points)


def sequence(
    lanes: Sequence[str], steps: Sequence[tuple[str, Sequence[str], str]], label: str
) -> Markup:
    """Who sends what to whom: a line down for each lane, an arrow for each (from, to, what)."""
    texts = ["\n".join(textwrap.wrap(what, 44)) for _, _, what in steps]
    heights = [0.75 + 0.45 * (text.count("\n") + 1) for text in texts]
    with mpl.rc_context(_SETTINGS):
        figure, axes = _axes(0.5 + 0.3 * sum(heights))
        axes.axis("off")
        for place, lane in enumerate(lanes):
            axes.text(place, 0.6, lane, ha="center", weight="bold")
            axes.plot([place, place], [0.3, -sum(heights)], color=_GRID, zorder=0)
        at = 0.0
        for (source, targets, _), text, height in zip(steps, texts, heights, strict=True):
            at -= height
            start = lanes.index(source)
            ends = [lanes.index(target) for target in targets if target != source]
            for end in ends:
                axes.annotate(
                    "", (end, at), (start, at), arrowprops={"arrowstyle": "-|>", "color": SERIES[0]}
                )
            axes.text(
                (min(start, *ends) + max(start, *ends)) / 2,
                at + 0.12,
                text,
                ha="center",
                va="bottom",
            )
        axes.set_xlim(-0.45, len(lanes) - 0.55)
        axes.set_ylim(-sum(heights) - 0.2, 1.1)
        return _svg(figure, {}, label)


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, names: Mapping[str, Any], label: str) -> Markup:
    if names:
        figure.legend(
            list(names.values()), list(names), loc="outside upper left", ncols=3, frameon=False
        )
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _placed(file.getvalue(), label)


def _placed(text: str, label: str) -> Markup:
    """A picture made fit for a page: scaled by it, coloured by its style, with ids that no other
    picture of the page has, and told by `label` to those who do not see it.
    """
    text = text[text.index("<svg") :]
    for colour, name in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    own = hashlib.sha256(label.encode()).hexdigest()[:8]
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>p{own}-", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    head = f'<svg {size.group()} role="img" aria-label="{escape(label)}">'
    # Matplotlib escapes every text that it writes.
    return Markup(re.sub(r"<svg [^>]*>", lambda found: head, text, count=1))  # noqa: S704  # nosec B704
