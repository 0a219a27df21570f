"""What may be said of an image, by what was shown of it. The page offers no more, but its server may be sent any."""

from __future__ import annotations

import re

from pipeline.errors import UsageError
from pipeline.review.decisions import ANSWERS, JUDGEMENTS
from pipeline.review.items import Item
from pipeline.review.picture import Shown

DECISION_ID = re.compile(r"[0-9a-f]{32}")
MAX_NAME = 64


class Refused(Exception):
    """What was asked for cannot be done; the page says why. ``gone``: and the image is not the page's any more."""

    def __init__(self, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.gone = gone


def check_reviewer(name: str) -> str:
    """Raises UsageError for a name that could not be read in a table."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(
            f"reviewer is {name!r}, but decisions carry this name: give one of 1 to {MAX_NAME} printable characters"
        )
    return name.strip()


def check_id(decision_id: str) -> None:
    """Raises Refused."""
    if not DECISION_ID.fullmatch(decision_id):
        raise Refused(f"A decision's id has 32 hexadecimal digits, not {decision_id[:40]!r}.")


def check_answer(item: Item, shown: Shown | None, answer: str, violating: tuple[str, ...], *, revealed: bool) -> Shown:
    """Returns what was shown. Raises Refused."""
    if answer not in ANSWERS:
        raise Refused(f"{answer[:40]!r} is no decision; there are {', '.join(ANSWERS)}.")
    if shown is None:
        raise Refused("Nobody has looked at this picture yet: wait until it is there.")
    if answer in JUDGEMENTS and shown.problem is not None:
        raise Refused("There is no picture to judge: say that it could not be seen, or leave it for later.")
    if answer == "not seen" and not shown.lost:
        raise Refused("Try to fetch it again first." if shown.problem else "The picture can be seen.")
    if answer == "not violating" and not revealed:
        raise Refused("Look at it first: a blurred picture cannot be cleared.")
    if not set(violating) <= set(item.categories) or bool(violating) != (answer == "violating"):
        raise Refused(f"Say what it violates, of {', '.join(item.categories)}.")
    return shown
