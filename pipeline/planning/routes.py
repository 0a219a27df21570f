"""Which tests in which order: every route that the candidates of a calibration allow.

A route is any number of nets that test images alone, or such a screen (or nothing), then groups that nest, then
images alone again. Letters in names: S steps, K categories.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

from pipeline.planning.scores import Arrangement, Candidate, Cost, Scores
from pipeline.steps.layout import SCREENED_WINDOW_IMAGES, WINDOW_IMAGES

MAX_GROUP_STEPS = 3
MAX_SINGLE_STEPS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Route:
    """A sequence of tests. ``arrangement``: the blocks its groups are looked up in; none when it tests no groups."""

    steps: tuple[Candidate, ...]
    arrangement: Arrangement | None = None

    @property
    def name(self) -> str:
        return " > ".join(step.name for step in self.steps)

    @property
    def screen_logits_K(self) -> np.ndarray | None:
        """Thresholds of the first step when the arrangement was drawn behind it: these are given, and stay."""
        if self.arrangement is None or self.arrangement.screen is None:
            return None
        return self.arrangement.screen_logits_K

    @property
    def screened(self) -> bool:
        return self.screen_logits_K is not None

    @property
    def size(self) -> int:
        return max(step.size for step in self.steps)

    @property
    def window_images(self) -> int:
        """Of the windows that a plan of this route gets: whole groups of every size."""
        images = SCREENED_WINDOW_IMAGES if self.screened else WINDOW_IMAGES
        length = math.lcm(*(step.size for step in self.steps))
        return max(1, images // length) * length

    def begins_kept(self, number: int) -> bool:
        """Whether a step starts from features: only those of a larger test of the same net, just before it."""
        if number == 0 or self.steps[number].gmac_kept is None:
            return False
        before, step = self.steps[number - 1 : number + 1]
        return before.net == step.net and before.size > step.size

    def decodes(self, number: int) -> bool:
        """Whether a step wants pixels of another size than are there."""
        return number == 0 or self.steps[number].input_size != self.steps[number - 1].input_size

    def nets_S(self, unit: Cost) -> np.ndarray:
        """What the nets cost of one image in each step."""
        return np.array(
            [step.cost(unit, kept=self.begins_kept(number)) / step.size for number, step in enumerate(self.steps)]
        )

    def costs_S(self, scores: Scores, unit: Cost) -> np.ndarray:
        """The same; seconds with those of decoding."""
        costs_S = self.nets_S(unit)
        if unit == "seconds":
            for number, step in enumerate(self.steps):
                costs_S[number] += scores.decode_seconds.get(step.input_size, 0.0) * self.decodes(number)
        return costs_S


def routes(scores: Scores, cost: Cost) -> Iterator[Route]:
    """Every sequence of the candidates: ever smaller nested groups, and images alone in nets of rising cost."""

    single = sorted((c for c in scores.candidates.values() if c.size == 1), key=lambda candidate: candidate.cost(cost))
    chains = [chain for length in range(1, MAX_SINGLE_STEPS + 1) for chain in combinations(single, length)]
    for chain in chains:
        yield Route(steps=chain)
    for arrangement in scores.arrangements:
        groups = [scores.candidates[name] for name in arrangement.scores]
        screen = () if arrangement.screen is None else (scores.candidates[arrangement.screen],)
        for nested in _nested(groups):
            for chain in chains:
                if len(chain) < MAX_SINGLE_STEPS and not set(screen) & set(chain):
                    yield Route(steps=(*screen, *nested, *chain), arrangement=arrangement)


def _nested(groups: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    ordered = sorted(groups, key=lambda candidate: -candidate.size)
    for length in range(1, MAX_GROUP_STEPS + 1):
        for chain in combinations(ordered, length):
            if all(a.size > b.size and a.size % b.size == 0 for a, b in pairwise(chain)):
                yield chain
