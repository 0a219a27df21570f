"""From how many positive first groups a window falls back (``plan.BurstRule``)."""

from __future__ import annotations

from scipy.stats import binom

from pipeline.plan import BurstRule

FALSE_ALARM = 0.001
LEAST_POWER = 0.5


def burst_rule(
    rounds: tuple[int, ...],
    *,
    calm_rate: float,
    break_even_rate: float,
    first_groups: int,
    group_size: int | None = None,
) -> BurstRule | None:
    """The rule that tells a burst from a calm window by its first groups; None where so few cannot tell.

    ``calm_rate`` and ``break_even_rate`` are shares of the first round's groups that are positive: at the
    prevalence the plan was made for, and at the one from which its first round no longer pays. A window falls
    back to groups of ``group_size``, or of the second round.

    Companions are random (an image's place is a salted hash), so the number of positive groups among the first is
    binomial. ``positive`` is the smallest count that a calm window reaches with a chance of at most 0.001: a false
    alarm costs GMAC, and so rarely that the plan's expected cost stands. A rule that would miss more than half of
    the windows at break-even is none: more first groups would make it one. Raises ValueError.
    """
    for name, rate in (("calm_rate", calm_rate), ("break_even_rate", break_even_rate)):
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} is {rate}, not in 0..1; give the share of positive groups")
    if len(rounds) < 2:
        return None
    for positive in range(1, first_groups + 1):
        if binom.sf(positive - 1, first_groups, calm_rate) <= FALSE_ALARM:
            if binom.sf(positive - 1, first_groups, break_even_rate) < LEAST_POWER:
                return None
            return BurstRule(first_groups=first_groups, positive=positive, group_size=group_size or rounds[1])
    return None
