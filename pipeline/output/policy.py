"""The policy: what is recommended to do with what a scan flags, by category and score. A YAML file.

It is no part of the plan: it changes no verdict, and another one changes no plan version. It is frozen with a run, so
that every row of a run was made by the same one.
"""

from __future__ import annotations

from datetime import date
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pipeline.documents import Strict, parse_document, read_document
from pipeline.errors import UsageError
from pipeline.mistakes import NUMBER, spelt

REVIEW = "review"
Action = Annotated[
    str,
    spelt(r"[a-z][a-z0-9_-]{0,31}", "an action: a letter a-z, then up to 31 of a-z, 0-9, '-' and '_', as in take_down"),
]
"""A short name of the owner's own, as ``remove``: it stands in tables and on pages."""


def _as_written(value: Any) -> Any:
    """Whole numbers and dates are what they look like; of 1.10 YAML keeps 1.1, which is another version."""
    if isinstance(value, float):
        raise ValueError(f"{value:g} is a number, of which 1.1 and 1.10 are the same one; put it in quotes, as '1.10'")
    return str(value) if isinstance(value, (int, date)) and not isinstance(value, bool) else value


Name = Annotated[
    str,
    BeforeValidator(_as_written),
    spelt(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "a letter or digit, then up to 63 letters, digits, '.', '-' and '_'"),
]
Score = Annotated[float, NUMBER, Field(ge=0, le=1, allow_inf_nan=False)]


class Band(Strict):
    """Scores from ``low`` up to, and without, ``high``; 1 is within a band that ends there."""

    low: Score = Field(alias="from")
    high: Score | None = Field(default=None, alias="to")
    """None: up to the next band, or to 1."""
    action: Action

    @model_validator(mode="after")
    def _check(self) -> Band:
        if self.high is not None and self.high <= self.low:
            raise ValueError(
                f"a band from {self.low:g} to {self.high:g} holds no score; give a 'to' above {self.low:g}, or leave "
                "it out: the band then ends where the next one begins"
            )
        return self


class CategoryPolicy(Strict):
    """``bands``: from the lowest score up. A score in none of them, and a hash match without an action of its own, take
    the policy's default."""

    bands: tuple[Band, ...] = ()
    hash_match: Action | None = None
    """Of what matches a bank of known content: a match has no score."""

    @model_validator(mode="after")
    def _check(self) -> CategoryPolicy:
        for lower, upper in pairwise(self.bands):
            if upper.low <= lower.low:
                raise ValueError(
                    f"a band from {upper.low:g} stands behind one from {lower.low:g}; put bands in order, the lowest "
                    "score first"
                )
            if lower.high is not None and lower.high > upper.low:
                raise ValueError(
                    f"the band from {lower.low:g} to {lower.high:g} overlaps the one from {upper.low:g}; let it end at "
                    f"{upper.low:g}, or leave out its 'to'"
                )
        return self

    def band_of(self, score: float) -> Band | None:
        ends = [*(band.low for band in self.bands[1:]), 1.0]
        # From above: a score of 1 is in a band of its own, when there is one from 1.
        for band, end in reversed(list(zip(self.bands, ends, strict=False))):
            high = end if band.high is None else band.high
            if band.low <= score < high or score == high == 1:
                return band
        return None


class Policy(Strict):
    """``version``: its owner's count of what was decided; a run record also has the SHA-256 of the file."""

    name: Name
    version: Name
    default: Action = REVIEW
    categories: dict[str, CategoryPolicy]

    def action(self, category: str, score: float | None) -> str:
        """What to do with a finding. ``score``: None of a hash match. Of a category that only an earlier run's plan
        had, the default."""
        known = self.categories.get(category)
        if known is None:
            return self.default
        if score is None:
            return known.hash_match or self.default
        band = known.band_of(score)
        return band.action if band else self.default


REVIEW_ALL = Policy(name="none", version="0", categories={})
"""Of a scan without a policy."""


def read_policy(uri: str, categories: tuple[str, ...], endpoint_url: str | None) -> dict[str, Any]:
    """The policy as a run is frozen with it: name, version, the file's SHA-256 and content.

    Raises UsageError, also where it does not name exactly the plan's categories.
    """
    policy, sha256 = read_document(Policy, "policy", uri, endpoint_url)
    unknown = sorted(set(policy.categories) - set(categories))
    missing = sorted(set(categories) - set(policy.categories))
    if unknown:
        raise UsageError(
            f"policy {uri}: categories {unknown} are not among the plan's, {sorted(categories)}; take them out, or "
            "name the plan that has them"
        )
    if missing:
        raise UsageError(
            f"policy {uri}: the plan's categories {missing} are not in it; give each its bands, or {{}} for the "
            f"default, {policy.default!r}"
        )
    content = policy.model_dump(mode="json", by_alias=True)
    return {"name": policy.name, "version": policy.version, "sha256": sha256, "content": content}


def frozen_policy(frozen: dict[str, Any] | None) -> Policy:
    """The policy of a frozen run: without one everything is to be reviewed."""
    return parse_document(Policy, frozen["content"], "the run's policy") if frozen else REVIEW_ALL
