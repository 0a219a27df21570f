"""Draws the pictures of docs/concepts.md: ``python docs/pictures/draw.py [FOLDER]``. A test compares.

Each is a card with a background of its own, in two sets of colours: it is legible on any page, light or dark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from models.intervals import interval

STYLE = """
  .card { fill: #ffffff } .line { stroke: #57606a; stroke-width: 1.5; fill: none } .thin { stroke: #d0d7de; fill: none }
  .calm { fill: #ddf4ff; stroke: #0969da } .hot { fill: #ffd8d3; stroke: #cf222e }
  .dim { fill: #eaeef2; stroke: #8c959f } .warm { fill: #fff1c9; stroke: #9a6700 }
  text { fill: #1f2328; font: 14px system-ui, sans-serif } .small { font-size: 12px } .head { font-weight: 600 }
  .mid { text-anchor: middle } .end { text-anchor: end } .curve { stroke: #0969da; stroke-width: 2.5; fill: none }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117 } .line { stroke: #9198a1 } .thin { stroke: #3d444d } text { fill: #f0f6fc }
    .calm { fill: #0c2d5b; stroke: #4493f8 } .hot { fill: #5d1a1c; stroke: #f85149 }
    .dim { fill: #21262d; stroke: #656c76 } .warm { fill: #4b3710; stroke: #d29922 } .curve { stroke: #4493f8 }
  }
"""


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words)}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="line" marker-end="url(#tip)" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"/>'


def block(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> Iterator[str]:
    """A box with lines in its middle, the first in bold."""
    yield box(x, y, width, height, kind)
    top = y + height / 2 - 8.5 * (len(lines) - 1) + 5
    for row, words in enumerate(lines):
        yield text(x + width / 2, top + 17 * row, words, "mid head" if row == 0 else "mid small")


def row_of_images(x: float, y: float, count: int, hot: set[int], side: float = 20, gap: float = 4) -> Iterator[str]:
    for number in range(count):
        yield box(x + number * (side + gap), y, side, side, "hot" if number in hot else "calm")


def group_test() -> tuple[int, int, list[str]]:
    """Two groups of 16: one without and one with a violating image."""
    parts = [text(24, 34, "No violating image among 16: one test, and all are cleared", "head")]
    parts += [*row_of_images(24, 48, 16, set()), arrow(412, 58, 448, 58)]
    parts += [*block(452, 42, 180, 32, "calm", "negative"), text(644, 63, "1 test instead of 16")]
    parts += [text(24, 118, "One among 16: its members are tested again, in smaller groups", "head")]
    parts += [*row_of_images(24, 132, 16, {6}), arrow(412, 142, 448, 142)]
    parts += [*block(452, 126, 180, 32, "hot", "positive"), text(644, 147, "1 test")]
    for number in range(4):
        x = 24 + number * 100
        parts += row_of_images(x, 190, 4, {2} if number == 1 else set())
        parts += block(x - 3, 218, 98, 24, "hot" if number == 1 else "calm", "positive" if number == 1 else "cleared")
    parts += [text(644, 220, "4 tests, of fours")]
    parts += row_of_images(124, 266, 4, {2})
    for number in range(4):
        parts += [text(134 + number * 24, 304, "F" if number == 2 else "c", "mid small head")]
    parts += [text(236, 281, "F: flagged   c: cleared", "small"), text(644, 281, "4 tests, of one each")]
    parts += [text(644, 312, "9 tests instead of 16", "head")]
    return 810, 330, parts


SHARES = [share / 1000 for share in range(0, 301, 4)]


def tests_per_image(share: float) -> float:
    """Of groups of 16, 4 and 1, when this share of the images tests positive wherever it stands."""
    return 1 / 16 + (1 - (1 - share) ** 16) / 4 + (1 - (1 - share) ** 4)


def prevalence() -> tuple[int, int, list[str]]:
    """How many tests an image takes, against the share of images that test positive."""

    def place(share: float, tests: float) -> tuple[float, float]:
        return 84 + share / 0.3 * 600, 300 - tests / 1.4 * 250

    parts = [text(24, 30, "Tests an image takes in groups of 16, then 4, then alone", "head")]
    for tests in (0, 0.25, 0.5, 0.75, 1, 1.25):
        x, y = place(0, tests)
        kind = "line" if tests in (0, 1) else "thin"
        parts += [f'<path class="{kind}" d="M{x:g} {y:g} H684"/>', text(x - 8, y + 5, f"{tests:g}", "end small")]
    for share in (0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        x, y = place(share, 0)
        parts += [text(x, y + 20, f"{share:.0%}", "mid small")]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(share, tests_per_image(share)) for share in SHARES))
    parts += [f'<polyline class="curve" points="{points}"/>']
    for share, words in ((0.01, "1 %: 0.14"), (0.05, "5 %: 0.39"), (0.1, "10 %: 0.61")):
        x, y = place(share, tests_per_image(share))
        parts += [f'<circle class="calm" cx="{x:g}" cy="{y:g}" r="5"/>', text(x + 10, y + 18, words, "small")]
    parts += [text(92, place(0, 1)[1] - 6, "every image alone", "small")]
    parts += [text(384, 342, "share of images that test positive: violating ones and look-alikes", "mid small")]
    return 708, 358, parts


def nesting() -> tuple[int, int, list[str]]:
    parts = [text(24, 30, "What is cut from what", "head")]
    parts += block(
        24,
        44,
        720,
        40,
        "dim",
        "manifest: every listed object, in the order of a salted hash, frozen when the run starts",
    )
    for number in range(3):
        parts += block(24 + number * 243, 104, 234, 40, "warm", f"shard {number}", "committed and resumed as a whole")
        parts += [arrow(141 + number * 243, 84, 141 + number * 243, 102)]
    parts += [arrow(60, 144, 60, 166)]
    for number in range(4):
        parts += block(24 + number * 182, 168, 174, 40, "calm", f"window {number}", "256 images: one row in Ray")
    parts += [arrow(60, 208, 60, 230)]
    for number in range(4):
        parts += [box(24 + number * 182, 232, 174, 34, "card"), box(24 + number * 182, 232, 174, 34, "thin")]
        parts += row_of_images(31 + number * 182, 239, 8, set(), 16, 4.5)
    parts += [
        text(24, 288, "groups: formed inside a window, in its order; images of different windows never meet", "small")
    ]
    parts += [
        text(
            24,
            316,
            "round: all tests of one group size by one net. stage: one net with its rounds, on one pool of actors.",
            "small",
        )
    ]
    return 768, 334, parts


def flow() -> tuple[int, int, list[str]]:
    parts = [
        text(
            24,
            30,
            "One scan: windows stream from left to right, and cleared images drop their bytes on the way",
            "head",
        )
    ]
    steps = [
        ("list", "manifest"),
        ("fetch", "bytes"),
        ("decode", "pixels"),
        ("stage 1", "cheap no"),
        ("stage 2", "good net"),
        ("write", "attempts"),
        ("commit", "the driver"),
    ]
    for number, (name, what) in enumerate(steps):
        kind = "warm" if name in ("list", "commit") else "calm"
        parts += block(24 + number * 118, 60, 94, 50, kind, name, what)
        if number:
            parts += [arrow(118 + (number - 1) * 118, 85, 140 + (number - 1) * 118, 85)]
    for number, words in ((1, "gone, denied,"), (2, "broken, hostile")):
        parts += [
            arrow(71 + number * 118, 110, 71 + number * 118, 142),
            text(71 + number * 118, 158, words, "mid small"),
        ]
    parts += [text(248, 175, "error rows, with a code", "mid small")]
    for number in (3, 4):
        parts += [arrow(71 + number * 118, 110, 71 + number * 118, 142)]
    parts += [
        text(484, 158, "cleared: the payload goes,", "mid small"),
        text(484, 175, "the ledger entry stays", "mid small"),
    ]
    parts += [arrow(779, 110, 779, 142)]
    parts += block(640, 146, 204, 66, "dim", "tables", "a shard at a time,", "then the run record")
    return 868, 232, parts


def outcomes() -> tuple[int, int, list[str]]:
    parts = [text(24, 30, "Every listed image ends in exactly one outcome", "head")]
    questions = [("judged before?", "same object or bytes"), ("fetched, decoded?", "within the limits"),
                 ("scored?", "by numbers"), ("over a threshold?", "in every round")]  # fmt: skip
    for number, words in enumerate(questions):
        parts += block(24 + number * 190, 50, 170, 44, "dim", *words)
        if number:
            parts += [arrow(194 + (number - 1) * 190, 72, 212 + (number - 1) * 190, 72)]
    ends = [
        (24, "warm", "skipped", "unchanged, or known", "yes"),
        (214, "warm", "error", "with a code", "no"),
        (404, "warm", "error", "score_not_finite", "no"),
        (594, "hot", "flagged", "a model says violating", "yes"),
    ]
    for x, kind, name, why, answer in ends:
        parts += [
            arrow(x + 85, 92, x + 85, 134),
            text(x + 94, 118, answer, "small"),
            *block(x, 138, 170, 46, kind, name, why),
        ]
    parts += [arrow(764, 72, 800, 72), text(774, 64, "no", "small")]
    parts += block(804, 49, 150, 46, "calm", "cleared", "a test of it said no")
    return 978, 206, parts


CASES = [
    (20, 20, "20 of 20"),
    (59, 59, "59 of 59"),
    (120, 120, "120 of 120"),
    (299, 299, "299 of 299"),
    (357, 360, "357 of 360"),
]


def intervals() -> tuple[int, int, list[str]]:
    """What so many positives found of so many say of recall: exact binomial intervals, as reports print them."""

    def place(recall: float) -> float:
        return 120 + (recall - 0.8) / 0.2 * 560

    parts = [text(24, 30, "What labelled positives say of recall: the 95 % interval that a report prints", "head")]
    for tick in (0.8, 0.85, 0.9, 0.95, 1.0):
        parts += [
            f'<path class="thin" d="M{place(tick):g} 46 V232"/>',
            text(place(tick), 250, f"{tick:.2f}", "mid small"),
        ]
    for row, (found, of, words) in enumerate(CASES):
        low, high = interval(found, of)
        y = 66 + row * 36
        parts += [text(108, y + 5, words, "end small"), box(place(low), y - 8, place(high) - place(low), 16, "calm")]
        parts += [f'<path class="line" d="M{place(found / of):.1f} {y - 13} V{y + 13}"/>']
        parts += [text(place(low) - 8, y + 5, f"{low:.4f}", "end small")]
    return 720, 266, parts


PICTURES = {"group-test": group_test, "prevalence": prevalence, "nesting": nesting, "flow": flow, "outcomes": outcomes,
            "intervals": intervals}  # fmt: skip


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path class="line" d="M1 1 L7 4 L1 7"/></marker>'
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}</style>",
        f"<defs>{tip}</defs>",
        box(0, 0, width, height, "card"),
        *parts,
        "</svg>",
        "",
    ]
    return "\n".join(lines)


def draw(folder: Path) -> None:
    for name, picture in PICTURES.items():
        (folder / f"{name}.svg").write_text(svg(*picture(), title=name.replace("-", " ")))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
