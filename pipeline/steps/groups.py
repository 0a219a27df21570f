"""How the undecided images of a window are put into groups.

Groups are formed inside a window, from the images no earlier stage has cleared, in ordinal order. An
image that failed before any test keeps its place as a hole in the first stage: it moves no other into
another group there. Behind a stage that clears most images it would hardly have been there, and leaves none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.plan import StageSpec
from pipeline.window import Image, Window


@dataclass(slots=True)
class Group:
    """One group on its way through the rounds. ``members``: positions in the window, None is a hole.

    ``size`` counts the images it was formed of, without holes. ``burst``: its window fell back to it.
    """

    window: Window
    number: str
    members: list[int | None]
    burst: bool = False
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.images)

    @property
    def images(self) -> list[Image]:
        images = (self.window.images[position] for position in self.members if position is not None)
        return [image for image in images if image.outcome is None]

    def split(self, size: int) -> list[Group]:
        parts = [self.members[start : start + size] for start in range(0, len(self.members), size)]
        return [Group(self.window, f"{self.number}.{index}", part, self.burst) for index, part in enumerate(parts)]

    def fall_back(self, size: int) -> list[Group]:
        """The parts with an undecided member, which are tested instead of this group."""
        return [part for part in replace(self, burst=True).split(size) if part.size]


def form_groups(window: Window, spec: StageSpec, *, across: bool = False) -> list[Group]:
    """Groups of the first round with at least one undecided member; the last one is filled with holes.

    ``across`` groups otherwise: the images are written row by row, a group a row, and read column by
    column. In a window of at least as many groups as a group has members, no two images meet twice.
    """
    size = spec.rounds[0]
    began = any(image.tests for image in window.images)
    found = [position for position, image in enumerate(window.images) if _has_place(image, began=began)]
    places: list[int | None] = [*found, *[None] * (-len(found) % size)]
    mark = ""
    if across:
        places = [place for column in range(size) for place in places[column::size]]
        mark = "x"
    groups = []
    for number, start in enumerate(range(0, len(places), size)):
        group = Group(window, f"{window.window}.{spec.name}.{mark}{number}", places[start : start + size])
        if group.size:
            groups.append(group)
    return groups


def _has_place(image: Image, *, began: bool) -> bool:
    """Whether it is undecided, or a hole: in the first stage that tests, and later if it was among the survivors."""
    return image.outcome is None or (image.outcome == "error" and (bool(image.tests) or not began))


def slots(groups: list[Group], size: int) -> Iterator[tuple[int, Group, int]]:
    """Where each undecided member of these groups stands in their device batch, its group and its position."""
    for offset, group in enumerate(groups):
        for slot, position in enumerate(group.members):
            if position is not None and group.window.images[position].outcome is None:
                yield offset * size + slot, group, position
