"""A reviewer's session: what comes next, and what becomes of a decision. It knows nothing of HTTP.

In a first review nothing of what the nets said leaves this module before the decision: drawn and flagged images must
be one to the reviewer. Who asks for it afterwards cannot take that decision back. Second opinions and appeals see the
history from the start.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pipeline.reporting.visible import visible
from pipeline.review import log as review_log
from pipeline.review.choice import Choice, Worklist, open_appeals
from pipeline.review.decisions import WITHDRAWN
from pipeline.review.items import Item
from pipeline.review.leases import Leases, now
from pipeline.review.log import ReviewLog
from pipeline.review.picture import Pictures, Shown
from pipeline.review.queue import Queue
from pipeline.review.rules import Refused, check_answer, check_id, check_reviewer
from pipeline.store import Store

MOST_AHEAD = 4
"""Images that a page may hold at one time."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A decision of this session, to be taken back."""

    decision_id: str
    item: Item
    rows: list[dict[str, Any]]


class Desk:
    """``kind``: first, second or appeal; ``appealed``: of appeals only, None for those that earlier ones left unsure;
    ``say``: takes lines for who runs the job."""

    def __init__(
        self,
        store: Store,
        queue: Queue,
        pictures: Pictures,
        *,
        kind: str,
        reviewer: str,
        appealed: list[Item] | None = None,
        clock: Callable[[], datetime] = now,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.queue, self.pictures, self.kind = queue, pictures, kind
        self.reviewer = check_reviewer(reviewer)
        self.log = ReviewLog(store)
        self.leases = Leases(store, kind, secrets.token_hex(16), clock)
        if kind == "appeal" and appealed is None:
            appealed = open_appeals(queue, self.log)
        choice = Choice(kind=kind, reviewer=self.reviewer, appealed=appealed or [])
        self.work = Worklist(choice, queue, self.log)
        self.lock = threading.RLock()
        self.held: dict[str, Item] = {}
        self.shown: dict[str, Shown] = {}
        self.say = say
        self.reported: set[str | None] = set()
        """Codes of failures that have been said."""
        self.made: list[Made] = []
        self.answered: dict[str, dict[str, Any]] = {}
        """What was answered to each decision id: a request that is sent again decides nothing twice."""
        self.unblinded: set[str] = set()
        """Decisions after which the reviewer has asked what the nets said."""

    def refresh(self) -> None:
        """Learns what others have decided."""
        with self.lock:
            self.leases.forget()
            if self.log.refresh():
                self.work.choose()

    def about(self) -> dict[str, Any]:
        return {
            "reviewer": self.reviewer,
            "kind": self.kind,
            "categories": list(self.queue.categories),
            "runs": list(self.queue.run_ids),
            "left_to_others": self.work.own,
        }

    def progress(self, category: str | None = None) -> dict[str, Any]:
        """``Worklist.counts`` of a category or of all; ``answers``: how those done by this reviewer ended."""
        with self.lock:
            answers = [self.log.of_image[made.item.image_id][made.decision_id] for made in self.made]
            return self.work.counts(category) | {
                "mine": len(self.made),
                "answers": review_log.count_answers(answers),
                "can_undo": bool(self.made) and self.made[-1].decision_id not in self.unblinded,
            }

    def next(self, have: list[str], category: str | None, wanted: int, *, again: bool = False) -> dict[str, Any]:
        """Up to ``wanted`` images that the page does not have yet, each with a lease. ``again``: skipped ones too."""
        with self.lock:
            if again:
                self.work.skipped.clear()
            self._put_down(have, category)
            found: list[dict[str, Any]] = []
            elsewhere = 0
            for item in self.work.to_go(category):
                if len(found) >= min(wanted, MOST_AHEAD - len(have)):
                    break
                if item.id in have:
                    continue
                if self.leases.take(item.image_id):
                    self.held[item.id] = item
                    found.append(self._to_page(item))
                else:
                    elsewhere += 1
            return {"items": found, "elsewhere": elsewhere, "progress": self.progress(category)}

    def _put_down(self, have: list[str], category: str | None) -> None:
        """Gives up what the page has let go of: after a change of the filter others may look at it."""
        for page_id, item in list(self.held.items()):
            if page_id not in have and category is not None and category not in item.near:
                self._let_go(item)

    def _let_go(self, item: Item) -> None:
        self.held.pop(item.id, None)
        self.leases.release([item.image_id])

    def _to_page(self, item: Item) -> dict[str, Any]:
        """The same of drawn and flagged images in a first review."""
        if self.kind == "first":
            return item.to_page()
        return item.to_page() | {"history": self._history(item, earlier=self.kind == "appeal")}

    def _history(self, item: Item, *, earlier: bool) -> dict[str, Any]:
        decisions = self.log.on(item.image_id) if earlier else []
        return {"tests": self.queue.history(item), "decisions": [decision.to_page() for decision in decisions]}

    def picture(self, page_id: str) -> Shown:
        """Fetches it. Raises Refused for what this session does not hold."""
        item = self._item(page_id)
        shown = self.pictures.show(item.uri, item.etag, item.size_bytes)
        with self.lock:
            if page_id in self.shown:
                shown = replace(shown, asked=self.shown[page_id].asked + 1)
            # The bytes are not kept: what matters is that there was something to look at, and what.
            self.shown[page_id] = replace(shown, jpeg=None)
            self._report(item, shown)
        return shown

    def _report(self, item: Item, shown: Shown) -> None:
        """What the store refuses is a matter of who runs the job: once for each way, not for each picture."""
        if shown.may_pass and shown.code not in self.reported:
            self.reported.add(shown.code)
            self.say(
                f"{shown.code}: pictures cannot be fetched, {visible(item.uri)} first. {shown.problem} Mend that, then "
                "try again on the page (R); others that fail so are not named here."
            )

    def _item(self, page_id: str) -> Item:
        with self.lock:
            if page_id not in self.held:
                raise Refused("This image is not yours to look at any more.", gone=True)
            return self.held[page_id]

    def decide(
        self, page_id: str, decision_id: str, answer: str, violating: tuple[str, ...], *, revealed: bool
    ) -> dict[str, Any]:
        """Returns when the decision is in the store; the same request again changes nothing. Raises Refused."""
        with self.lock:
            if decision_id in self.answered:
                return self.answered[decision_id]
            item = self._item(page_id)
            check_id(decision_id)
            shown = check_answer(item, self.shown.get(page_id), answer, violating, revealed=revealed)
            self._check_lease(item)
            rows = review_log.rows_of(
                decision_id=decision_id,
                kind=self.kind,
                reviewer=self.reviewer,
                item_rows={"run_id": item.run_id, "image_id": item.image_id, "source_uri": item.uri},
                categories=item.categories,
                answer=answer,
                violating=violating,
                revealed=revealed,
                sha256=shown.sha256,
            )
            self.log.write(rows)
            self.made.append(Made(decision_id=decision_id, item=item, rows=rows))
            self.work.look_again(item)
            self.held.pop(page_id)
            # The lease of what is done runs out by itself: others may not know of the decision yet.
            if item.image_id in self.work.waiting:
                self.leases.release([item.image_id])
            self.answered[decision_id] = {"answer": answer, "can_undo": True}
            return self.answered[decision_id]

    def _check_lease(self, item: Item) -> None:
        """After minutes without a decision somebody else may have it, or may have decided."""
        lapsed = not self.leases.runs(item.image_id)
        if not self.leases.take(item.image_id):
            self.held.pop(item.id)
            raise Refused("You had it for so long that another reviewer has it now; nothing was recorded.", gone=True)
        if lapsed and self.log.refresh():
            self.work.choose()
            if item.image_id in self.work.done:
                self._let_go(item)
                raise Refused("Another reviewer has decided it meanwhile; nothing was recorded.", gone=True)

    def undo(self, decision_id: str) -> dict[str, Any]:
        """Takes back the last decision of this session, and gives the image out again. Raises Refused."""
        with self.lock:
            if decision_id in self.answered:
                return self.answered[decision_id]
            check_id(decision_id)
            if not self.made:
                raise Refused("There is nothing to take back in this session.")
            last = self.made[-1]
            if last.decision_id in self.unblinded:
                raise Refused(
                    "You have seen what the nets said of it, so your decision stays; a second opinion can differ."
                )
            taken = {"decision_id": decision_id, "decided_at": now(), "withdraws": last.decision_id}
            taken |= {"decision": WITHDRAWN, "label": None}
            self.log.write([row | taken for row in last.rows])
            self.made.pop()
            self.work.look_again(last.item)
            self.leases.take(last.item.image_id)
            self.held[last.item.id] = last.item
            self.answered[decision_id] = {"item": self._to_page(last.item)}
            return self.answered[decision_id]

    def skip(self, page_id: str) -> None:
        """Leaves an image for later, or for others. Raises Refused."""
        with self.lock:
            item = self._item(page_id)
            self.work.skipped.add(item.image_id)
            self._let_go(item)

    def history_of_last(self) -> dict[str, Any]:
        """What was said of the image decided last, by nets and people. In a first review the decision stays from then
        on. Raises Refused."""
        with self.lock:
            if not self.made:
                raise Refused("There is no decision of yours in this session whose history could be shown.")
            last = self.made[-1]
            if self.kind != "appeal":
                self.unblinded.add(last.decision_id)
            history = self._history(last.item, earlier=True)
            return last.item.to_page() | {"history": history}

    def close(self) -> None:
        """Gives back what was not decided."""
        with self.lock:
            self.leases.release([item.image_id for item in self.held.values()])
            self.held.clear()
