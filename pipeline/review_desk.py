"""A reviewer's session: what comes next, and what becomes of a decision. It knows nothing of HTTP.

In a first review nothing of what the nets said leaves this module before the decision: drawn and flagged images must
be one to the reviewer. Who asks for it afterwards cannot take that decision back. Second opinions and appeals see the
history from the start.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline import review_log
from pipeline.decisions import ANSWERS, KINDS, LABELS, WITHDRAWN
from pipeline.errors import UsageError
from pipeline.leases import Leases, now
from pipeline.review_log import ReviewLog
from pipeline.review_picture import Pictures, Shown
from pipeline.review_queue import Item, Queue, find_appealed
from pipeline.store import Store

MOST_AHEAD = 4
"""Images that a page may hold at one time."""
DECISION_ID = re.compile(r"[0-9a-f]{32}")
MAX_NAME = 64


class Refused(Exception):
    """What was asked for cannot be done; the page says why. ``gone``: and the image is not the page's any more."""

    def __init__(self, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.gone = gone


@dataclass(frozen=True, kw_only=True)
class Made:
    """A decision of this session, to be taken back."""

    decision_id: str
    item: Item
    rows: list[dict[str, Any]]


def check_reviewer(name: str) -> str:
    """Raises UsageError for a name that could not be read in a table."""
    if not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise UsageError(
            f"reviewer is {name!r}, but decisions carry this name: give one of 1 to {MAX_NAME} printable characters"
        )
    return name.strip()


class Desk:
    """``kind``: first, second or appeal; ``appealed``: uris or image ids, of appeals only."""

    def __init__(
        self,
        store: Store,
        queue: Queue,
        pictures: Pictures,
        *,
        kind: str,
        reviewer: str,
        appealed: list[str] | None = None,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self.queue, self.pictures, self.kind = queue, pictures, kind
        self.reviewer = check_reviewer(reviewer)
        self.log = ReviewLog(store)
        self.leases = Leases(store, kind, secrets.token_hex(16), clock)
        self.items = {item.id: item for item in queue.items}
        self.appealed = find_appealed(queue, appealed or []) if kind == "appeal" else []
        self.lock = threading.RLock()
        self.held: dict[str, Item] = {}
        self.shown: dict[str, Shown] = {}
        self.skipped: set[str] = set()
        self.made: list[Made] = []
        self.answered: dict[str, dict[str, Any]] = {}
        """What was answered to each decision id: a request that is sent again decides nothing twice."""
        self.unblinded: set[str] = set()
        """Decisions after which the reviewer has asked what the nets said."""
        self.left_to_others = 0
        self._sort()

    def _sort(self) -> None:
        """What this session goes through, done or not. Who has decided on an image gives no further opinion on it."""
        if self.kind == "first":
            self.todo = self.queue.items
        else:
            wanted = self.appealed if self.kind == "appeal" else self._wanting_second()
            self.todo = [item for item in wanted if not self._decided_by_me(item)]
            self.left_to_others = len(wanted) - len(self.todo)
        self.done = {item.image_id for item in self.todo if self._is_done(item)}

    def _wanting_second(self) -> list[Item]:
        """Judged images: unsure ones first, then those where person and net disagree, then the rest."""

        def order(item: Item) -> int:
            first = self.log.newest(item.image_id, KINDS[0])
            assert first is not None
            return 0 if first.answer == "unsure" else 1 if (first.answer == "violating") != item.flagged else 2

        judged = [
            item
            for item in self.queue.items
            if (first := self.log.newest(item.image_id, KINDS[0])) is not None and first.judges
        ]
        return sorted(judged, key=order)

    def _decided_by_me(self, item: Item) -> bool:
        """In another kind of review than this one."""
        return any(
            decision.reviewer == self.reviewer and decision.kind != self.kind
            for decision in self.log.on(item.image_id)
            if decision.judges
        )

    def _is_done(self, item: Item) -> bool:
        """A plan that looks for more than the one before asks about an image again."""
        made = [decision for decision in self.log.on(item.image_id) if self.kind in (decision.kind, "first")]
        return bool(made) and set(item.categories) <= frozenset.union(*(decision.asked for decision in made))

    def refresh(self) -> None:
        """Learns what others have decided."""
        with self.lock:
            self.leases.forget()
            if self.log.refresh():
                self._sort()

    def about(self) -> dict[str, Any]:
        return {
            "reviewer": self.reviewer,
            "kind": self.kind,
            "categories": list(self.queue.categories),
            "runs": list(self.queue.run_ids),
            "left_to_others": self.left_to_others,
        }

    def progress(self, category: str | None = None) -> dict[str, Any]:
        """Images done and in all, of a category or of all; ``answers``: how those done by this reviewer ended."""
        with self.lock:
            chosen = [item for item in self.todo if category is None or category in item.near]
            mine = [made.rows for made in self.made]
            answers = [self.log.of_image[rows[0]["image_id"]][rows[0]["decision_id"]] for rows in mine]
            return {
                "done": sum(item.image_id in self.done for item in chosen),
                "total": len(chosen),
                "skipped": sum(item.image_id in self.skipped for item in chosen),
                "mine": len(self.made),
                "answers": review_log.count_answers(answers),
                "can_undo": bool(self.made) and self.made[-1].decision_id not in self.unblinded,
            }

    def next(self, have: list[str], category: str | None, wanted: int, *, again: bool = False) -> dict[str, Any]:
        """Up to ``wanted`` images that the page does not have yet, each with a lease. ``again``: skipped ones too."""
        with self.lock:
            if again:
                self.skipped.clear()
            self._put_down(have, category)
            found: list[dict[str, Any]] = []
            elsewhere = 0
            for item in self._open(category):
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

    def _open(self, category: str | None) -> Iterator[Item]:
        for item in self.todo:
            if item.image_id in self.done or item.image_id in self.skipped:
                continue
            if category is None or category in item.near:
                yield item

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
            # The bytes are not kept: what matters is that there was something to look at, and what.
            self.shown[page_id] = Shown(sha256=shown.sha256, code=shown.code, problem=shown.problem)
        return shown

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
            self._check(item, decision_id, answer, violating, revealed=revealed)
            self._check_lease(item)
            shown = self.shown[page_id]
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
            self.done.add(item.image_id)
            self.held.pop(page_id)
            self.answered[decision_id] = {"answer": answer, "can_undo": True}
            return self.answered[decision_id]

    def _check(self, item: Item, decision_id: str, answer: str, violating: tuple[str, ...], *, revealed: bool) -> None:
        shown = self.shown.get(item.id)
        if not DECISION_ID.fullmatch(decision_id):
            raise Refused(f"A decision's id has 32 hexadecimal digits, not {decision_id[:40]!r}.")
        if answer not in ANSWERS:
            raise Refused(f"{answer[:40]!r} is no decision; there are {', '.join(ANSWERS)}.")
        if shown is None:
            raise Refused("Nobody has looked at this picture yet: wait until it is there.")
        if answer in LABELS and shown.problem is not None:
            raise Refused("There is no picture to judge: say that it could not be seen, or skip it.")
        if answer == "not seen" and shown.problem is None:
            raise Refused("The picture can be seen.")
        if answer == "not violating" and not revealed:
            raise Refused("Look at it first: a blurred picture cannot be cleared.")
        if not set(violating) <= set(item.categories) or bool(violating) != (answer == "violating"):
            raise Refused(f"Say what it violates, of {', '.join(item.categories)}.")

    def _check_lease(self, item: Item) -> None:
        """After minutes without a decision somebody else may have it, or may have decided."""
        lapsed = not self.leases.runs(item.image_id)
        if not self.leases.take(item.image_id):
            self.held.pop(item.id)
            raise Refused("You had it for so long that another reviewer has it now; nothing was recorded.", gone=True)
        if lapsed and self.log.refresh():
            self._sort()
            if item.image_id in self.done:
                self._let_go(item)
                raise Refused("Another reviewer has decided it meanwhile; nothing was recorded.", gone=True)

    def undo(self, decision_id: str) -> dict[str, Any]:
        """Takes back the last decision of this session, and gives the image out again. Raises Refused."""
        with self.lock:
            if decision_id in self.answered:
                return self.answered[decision_id]
            if not DECISION_ID.fullmatch(decision_id):
                raise Refused(f"A decision's id has 32 hexadecimal digits, not {decision_id[:40]!r}.")
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
            if not self._is_done(last.item):
                self.done.discard(last.item.image_id)
            self.leases.take(last.item.image_id)
            self.held[last.item.id] = last.item
            self.answered[decision_id] = {"item": self._to_page(last.item)}
            return self.answered[decision_id]

    def skip(self, page_id: str) -> None:
        """Leaves an image for later, or for others. Raises Refused."""
        with self.lock:
            item = self._item(page_id)
            self.skipped.add(item.image_id)
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
