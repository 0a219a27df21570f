"""Which images a session goes through, by its kind, and which of them are done for its reviewer.

Nobody gives a further opinion on what they have decided. An image is done when somebody has decided it in a review of
this kind. What a second opinion or an appeal left unsure is done for who said so, and open for everybody else: no
review of another kind would ask about it again, and an appeal has to get an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.decisions import KINDS, UNSURE
from pipeline.errors import UsageError
from pipeline.review_items import Item
from pipeline.review_log import Decision, ReviewLog
from pipeline.review_queue import Queue

FIRST = KINDS[0]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """``items``: done or not, in order. The other two count images that are not among them."""

    items: list[Item]
    own: int = 0
    """The reviewer has decided them in a review of another kind."""
    unjudged: int = 0
    """No first review has come to a judgement: second opinions have nothing to second."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``appealed``: what is appealed about, of appeals only."""

    kind: str
    reviewer: str
    appealed: list[Item]

    def choose(self, queue: Queue, log: ReviewLog) -> Chosen:
        if self.kind == FIRST:
            return Chosen(items=queue.items)
        wanted = self.appealed if self.kind == "appeal" else self._judged(queue, log)
        items = [item for item in wanted if not self._decided_before(item, log)]
        unjudged = len(queue.items) - len(wanted) if self.kind == "second" else 0
        return Chosen(items=items, own=len(wanted) - len(items), unjudged=unjudged)

    def _judged(self, queue: Queue, log: ReviewLog) -> list[Item]:
        """Unsure ones first, then those where person and net disagree, then the rest."""
        last = {item.image_id: _opinion(item, log) for item in queue.items}

        def order(item: Item) -> int:
            said = last[item.image_id]
            assert said is not None
            return 0 if said.answer == UNSURE else 1 if (said.answer == "violating") != item.flagged else 2

        return sorted((item for item in queue.items if last[item.image_id]), key=order)

    def _decided_before(self, item: Item, log: ReviewLog) -> bool:
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
            "somebody appealed about with --appeals FILE"
        )
    return found


def _opinion(item: Item, log: ReviewLog) -> Decision | None:
    """The last judgement below an appeal; None where a first review has come to none."""
    first = log.judgement(item.image_id, FIRST)
    return first and (log.judgement(item.image_id, "second") or first)
