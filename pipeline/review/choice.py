"""Which images a session goes through, by its kind, which of them are done for its reviewer, and what is left out.

Nobody gives a further opinion on what they have decided. An image is done when somebody has decided it in a review of
this kind. What a second opinion or an appeal left unsure is done for who said so, and open for everybody else: no
review of another kind would ask about it again, and an appeal has to get an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import UsageError
from pipeline.review.decisions import KINDS, UNSURE
from pipeline.review.items import Item
from pipeline.review.log import Decision, ReviewLog
from pipeline.review.queue import Queue

FIRST = KINDS[0]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``appealed``: what is appealed about, of appeals only."""

    kind: str
    reviewer: str
    appealed: list[Item]

    def wanted(self, queue: Queue, log: ReviewLog) -> list[Item]:
        """What a review of this kind is about, whoever is to look at it."""
        if self.kind == FIRST:
            return queue.items
        return self.appealed if self.kind == "appeal" else self._judged(queue, log)

    def _judged(self, queue: Queue, log: ReviewLog) -> list[Item]:
        """Unsure ones first, then those where person and net disagree, then the rest."""
        last = {item.image_id: _opinion(item, log) for item in queue.items}

        def order(item: Item) -> int:
            said = last[item.image_id]
            assert said is not None
            return 0 if said.answer == UNSURE else 1 if (said.answer == "violating") != item.flagged else 2

        return sorted((item for item in queue.items if last[item.image_id]), key=order)

    def is_own(self, item: Item, log: ReviewLog) -> bool:
        """Whether the reviewer has judged it in another kind of review, and gives no further opinion."""
        if self.kind == FIRST:
            return False
        said = (decision for decision in log.on(item.image_id) if decision.judges)
        return any(decision.reviewer == self.reviewer and decision.kind != self.kind for decision in said)

    def _is_open(self, item: Item, log: ReviewLog) -> bool:
        """Whether somebody else may say more."""
        return self.kind != FIRST and is_unsure(item, self.kind, log)

    def is_done(self, item: Item, log: ReviewLog) -> bool:
        """A plan that looks for more than the one before asks about an image again."""
        made = [decision for decision in log.on(item.image_id) if self.kind in (decision.kind, FIRST)]
        if self._is_open(item, log):
            made = [decision for decision in made if decision.reviewer == self.reviewer]
        return bool(made) and set(item.categories) <= frozenset.union(*(decision.asked for decision in made))

    def waits(self, item: Item, log: ReviewLog) -> bool:
        """Done for this reviewer, and open for somebody else."""
        return self._is_open(item, log) and self.is_done(item, log)


class Worklist:
    """What a session goes through, in order, and how far that is done."""

    def __init__(self, choice: Choice, queue: Queue, log: ReviewLog) -> None:
        self.choice, self.queue, self.log = choice, queue, log
        self.skipped: set[str] = set()
        self.choose()

    def choose(self) -> None:
        """Again, when others have decided something."""
        wanted = self.choice.wanted(self.queue, self.log)
        self.items = [item for item in wanted if not self.choice.is_own(item, self.log)]
        self.own = len(wanted) - len(self.items)
        self.unjudged = len(self.queue.items) - len(wanted) if self.choice.kind == "second" else 0
        self.done = {item.image_id for item in self.items if self.choice.is_done(item, self.log)}
        self.waiting = {item.image_id for item in self.items if self.choice.waits(item, self.log)}

    def look_again(self, item: Item) -> None:
        """After a decision on it, or one that was taken back."""
        for images, belongs in ((self.done, self.choice.is_done), (self.waiting, self.choice.waits)):
            images.discard(item.image_id)
            if belongs(item, self.log):
                images.add(item.image_id)

    def of_category(self, category: str | None) -> list[Item]:
        return [item for item in self.items if category is None or category in item.near]

    def to_go(self, category: str | None) -> Iterator[Item]:
        for item in self.of_category(category):
            if item.image_id not in self.done and item.image_id not in self.skipped:
                yield item

    def counts(self, category: str | None) -> dict[str, int]:
        """Images done and in all; ``waiting``: those done that somebody else has to look at."""
        images = [item.image_id for item in self.of_category(category)]
        parts = {"done": self.done, "skipped": self.skipped, "waiting": self.waiting}
        return {"total": len(images)} | {name: sum(image in part for image in images) for name, part in parts.items()}

    def in_words(self) -> str:
        """What the session is about and what it leaves out, in a line."""
        left_out = {
            f"that {self.choice.reviewer} decided in another kind of review": self.own,
            "that no first review has judged": self.unjudged,
        }
        runs, said = (", ".join(parts) for parts in (self.queue.run_ids, _counted(left_out)))
        waiting = f", {len(self.waiting):,} of them unsure, for somebody else" if self.waiting else ""
        line = f"{runs}: {len(self.items):,} images to review, {len(self.done):,} decided{waiting}"
        return f"{line}; left out: {said}" if said else line


def _counted(reasons: dict[str, int]) -> list[str]:
    return [f"{images:,} {why}" for why, images in reasons.items() if images]


def is_unsure(item: Item, kind: str, log: ReviewLog) -> bool:
    """Whether the last judgement of a kind left it so."""
    said = log.judgement(item.image_id, kind)
    return said is not None and said.answer == UNSURE


def open_appeals(queue: Queue, log: ReviewLog) -> list[Item]:
    """What earlier appeals left unsure. Raises UsageError where that is nothing."""
    found = [item for item in queue.items if is_unsure(item, "appeal", log)]
    if not found:
        raise UsageError(
            f"no appeal about what {', '.join(queue.run_ids)} flagged or drew was left unsure: name the images that "
            "somebody appealed about with --appeals FILE, or other runs with --run-id"
        )
    return found


def _opinion(item: Item, log: ReviewLog) -> Decision | None:
    """The last judgement below an appeal; None where a first review has come to none."""
    first = log.judgement(item.image_id, FIRST)
    return first and (log.judgement(item.image_id, "second") or first)
