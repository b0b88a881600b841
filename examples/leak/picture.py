"""The picture of the leak demonstration, as SVG without any library: bars on the left, sentences on
the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Protocol

COLOURS = {
    "plain": "#c0392b",
    "sum of 8": "#e0a458",
    "epsilon 8": "#7fb3a6",
    "epsilon 3": "#3d8b7d",
    "epsilon 1": "#1f5d54",
}
TITLES = {
    "plain": "one customer's update, unprotected",
    "sum of 8": "masked sum of 8 customers, no noise",
    "epsilon 8": "masked sum with noise, epsilon 8",
    "epsilon 3": "masked sum with noise, epsilon 3",
    "epsilon 1": "masked sum with noise, epsilon 1",
}
WIDTH, HEIGHT = 1180, 560
LEFT, TOP, PLOT_WIDTH, PLOT_HEIGHT = 70, 120, 520, 300
TEXT_AT, LONGEST = 650, 64
INK, PALE = "#222222", "#8a8a8a"


class Attack(Protocol):
    """What a bar is drawn from; see `leak.Found`."""

    protection: str
    batch: int
    recovered: float
    chance: float


def draw(found: Sequence[Attack], shown: Mapping[str, Sequence[str]], pool: int) -> str:
    """The picture.

    Args:
        found: one attack for each protection and size of batch.
        shown: "in the batch" -> its sentences; protection -> the sentences that were read out of
            that update.
        pool: sentences that the attacker chooses from.
    """
    batches = list(dict.fromkeys(attack.batch for attack in found))
    kinds = list(dict.fromkeys(attack.protection for attack in found))
    about = (
        f"An attacker picks sentences out of a pool of {pool:,} that explain a gradient of the",
        (
            "classification head. Share of one customer's batch that it names exactly (dashed:"
            " blindly)."
        ),
    )
    parts = [
        _text(
            LEFT - 50,
            36,
            "What an update tells about the records it was made from",
            size=21,
            weight="bold",
        )
    ]
    parts += [
        _text(LEFT - 50, 60 + 18 * line, text, size=13, fill=PALE)
        for line, text in enumerate(about)
    ]
    for percent in range(0, 101, 25):
        y = TOP + PLOT_HEIGHT * (1 - percent / 100)
        parts.append(
            f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + PLOT_WIDTH}" y2="{y}" stroke="#dddddd"/>'
        )
        parts.append(_text(LEFT - 8, y + 4, f"{percent}%", size=12, anchor="end", fill=PALE))
    slot = PLOT_WIDTH / len(batches)
    bar = slot * 0.82 / len(kinds)
    for column, batch in enumerate(batches):
        for place, kind in enumerate(kinds):
            attack = next(
                attack for attack in found if (attack.protection, attack.batch) == (kind, batch)
            )
            value, blind = attack.recovered, TOP + PLOT_HEIGHT * (1 - attack.chance)
            x = LEFT + column * slot + slot * 0.09 + place * bar
            height = max(PLOT_HEIGHT * value, 1)
            y = TOP + PLOT_HEIGHT - height
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{height:.1f}"'
                f' fill="{COLOURS[kind]}"/>'
            )
            dashes = 'stroke="#222222" stroke-dasharray="3 2"'
            parts.append(
                f'<line x1="{x - 1:.1f}" y1="{blind:.1f}" x2="{x + bar - 1:.1f}" y2="{blind:.1f}"'
                f" {dashes}/>"
            )
            parts.append(
                _text(x + bar / 2 - 1, min(y, blind) - 4, f"{value:.0%}", size=11, anchor="middle")
            )
        middle = LEFT + (column + 0.5) * slot
        parts.append(
            _text(
                middle,
                TOP + PLOT_HEIGHT + 20,
                f"{batch} record{'s' * (batch > 1)}",
                size=13,
                anchor="middle",
            )
        )
    for place, kind in enumerate(kinds):
        x, y = LEFT + (place % 2) * 270, TOP + PLOT_HEIGHT + 52 + place // 2 * 24
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{COLOURS[kind]}"/>')
        parts.append(_text(x + 21, y, TITLES[kind], size=12))
    parts += _sentences(shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}"'
        f' height="{HEIGHT}" font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif">\n<rect'
        f' width="{WIDTH}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _sentences(shown: Mapping[str, Sequence[str]]) -> list[str]:
    truth = set(shown["in the batch"])
    y, parts = 84, []
    blocks = {
        "in the batch": f"A batch of {len(truth)} private records",
        "plain": "Read out of the unprotected update",
        "epsilon 3": "Read out of the masked sum with noise, epsilon 3",
    }
    for key, title in blocks.items():
        parts.append(_text(TEXT_AT, y, title, size=15, weight="bold", fill=COLOURS.get(key, INK)))
        for sentence in shown[key]:
            y += 22
            right = sentence in truth
            mark = "" if key == "in the batch" else "\u2713 " if right else "\u2717 "
            text = sentence if len(sentence) <= LONGEST else sentence[: LONGEST - 1] + "\u2026"
            parts.append(_text(TEXT_AT, y, mark + text, size=13, fill=INK if right else PALE))
        y += 44
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    weight: str = "normal",
    anchor: str = "start",
    fill: str = INK,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}"'
        f' text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )
