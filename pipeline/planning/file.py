"""A proposal as a plan that a scan can run: stages, thresholds, pools that fit a machine, and its burst rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import yaml

from pipeline.plan import Actors, BurstRule, Certificate, Plan, Pool, Preparation, StageSpec, WindowSpec
from pipeline.planning.burst import burst_rule
from pipeline.planning.field import Field
from pipeline.planning.proposal import Judged, Proposal, Request
from pipeline.planning.routes import Route
from pipeline.planning.scores import Candidate, Scores, to_scores
from pipeline.steps.layout import BATCH_IMAGES, windows_per_call

FETCH_CPUS = 0.5
WRITE_CPUS = 0.25
LEAST_CPUS = 0.15
"""Of a decoder: below this Ray would start more of them than their imports are worth."""
FUSED_WINDOWS = 2
"""Of one call of a fused actor, at most: the last calls of a run should be short, and files are in its memory."""
FIRST_GROUPS = 8
"""Whose results tell a burst."""
PREVALENCES = np.geomspace(1e-5, 0.5, 60)


def to_plan(scores: Scores, proposal: Proposal, name: str, cpus: float, gpus: float) -> Plan:
    """``cpus`` and ``gpus``: what its pools may take at least; a larger machine raises their ``actors.max``."""
    judged, request = proposal.chosen, proposal.request
    stages = list(_stages(judged.route))
    firsts = [judged.route.steps[places[0]] for places in stages]
    window = WindowSpec(images=judged.route.window_images)
    names = _names(firsts)
    calls = [windows_per_call(float(judged.spent.reached_S[places[0]]), window.images) for places in stages]
    decoders = sum(judged.route.decodes(places[0]) for places in stages)
    return Plan(
        name=name,
        categories=scores.categories,
        window=window,
        preparation=_preparation(cpus, len(stages), decoders) if gpus else Preparation(),
        fused=None if gpus else _fused(cpus, min(FUSED_WINDOWS, max(calls))),
        stages=tuple(
            StageSpec(
                name=names[number],
                model=first.model,
                rounds=_rounds(judged.route, places),
                thresholds={
                    category: tuple(_rounded_down(logit) for logit in judged.thresholds_SK[places, k])
                    for k, category in enumerate(scores.categories)
                },
                input_size=first.input_size,
                batch_images=max(1, BATCH_IMAGES // first.size) * first.size,
                num_gpus=_gpu_share(gpus, len(stages)),
                windows_per_call=calls[number],
                burst=_burst(scores, judged, request, window) if number == 0 else None,
            )
            for number, (first, places) in enumerate(zip(firsts, stages, strict=True))
        ),
        certificate=Certificate(
            recall={
                c: math.floor(1e6 * bound) / 1e6 for c, bound in zip(scores.categories, proposal.bound_K, strict=True)
            },
            confidence=request.confidence,
            prevalence=dict(zip(scores.categories, request.prevalence.mean_K, strict=True)),
            positives=dict(zip(scores.categories, proposal.positives_K, strict=True)),
        ),
    )


def _fused(cpus: float, windows: int) -> Pool:
    """An actor for every CPU: with its decoder it takes that much, and there is nothing else to run."""
    actors = max(1, math.floor(cpus))
    return Pool(num_cpus=1.0, actors=Actors(min=actors, max=actors), windows_per_call=windows)


def _preparation(cpus: float, stages: int, decoders: int) -> Preparation:
    """What feeds GPUs: of the CPUs that the stages' actors (one each) and Ray (one) leave, all decode."""
    room = (cpus - 1.0 - stages - FETCH_CPUS - WRITE_CPUS) / decoders
    decode = (
        Pool(actors=Actors(max=math.floor(room))) if room > 1 else Pool(num_cpus=max(LEAST_CPUS, _hundredths(room)))
    )
    return Preparation(
        fetch=Pool(num_cpus=FETCH_CPUS), decode=decode, write=Pool(num_cpus=WRITE_CPUS, windows_per_call=2)
    )


def _hundredths(share: float) -> float:
    return math.floor(100 * share) / 100


def _gpu_share(gpus: float, stages: int) -> float:
    """Of each stage: a fraction, or whole GPUs, as Ray wants them; together never more than there are."""
    share = gpus / stages
    return float(math.floor(share)) if share >= 1 else _hundredths(share)


def plan_yaml(plan: Plan, header: Sequence[str]) -> str:
    content = plan.model_dump(mode="json", exclude_defaults=True)
    comments = "".join(f"# {line}\n" for line in header)
    return comments + yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def _stages(route: Route) -> Iterator[list[int]]:
    """Places among the route's steps, stage by stage: steps that reuse features are rounds of one."""
    places: list[int] = []
    for place in range(len(route.steps)):
        if places and not route.begins_kept(place):
            yield places
            places = []
        places.append(place)
    yield places


def _rounds(route: Route, places: Sequence[int]) -> tuple[int, ...]:
    return tuple(route.steps[place].size for place in places)


def _names(firsts: Sequence[Candidate]) -> list[str]:
    """Of stages that begin with these tests."""
    names: list[str] = []
    for number, first in enumerate(firsts):
        role = "group" if first.size > 1 else "single" if number + 1 == len(firsts) else "screen"
        again = sum(name.partition("-")[0] == role for name in names)
        names.append(f"{role}-{again + 1}" if again else role)
    return names


def _rounded_down(logit: float) -> float:
    """Six digits, never above the threshold that was certified."""
    score = float(to_scores(np.array(logit)))
    if score == 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(score)) - 5)
    return round(math.floor(score / unit) * unit, 12)


def _burst(scores: Scores, judged: Judged, request: Request, window: WindowSpec) -> BurstRule | None:
    """For a first stage of groups: when its first round no longer pays, as its first groups can tell."""
    route, thresholds_SK = judged.route, judged.thresholds_SK
    rounds = _rounds(route, next(_stages(route)))
    if len(rounds) < 2:
        return None
    fallback = Route(steps=route.steps[1:], arrangement=route.arrangement if rounds[1] > 1 else None)
    planned, instead = (Field(scores, each, "certify", request.prevalence, request.cost) for each in (route, fallback))
    costs = zip(
        PREVALENCES,
        planned.spend_at(thresholds_SK, PREVALENCES),
        instead.spend_at(thresholds_SK[1:], PREVALENCES),
        strict=True,
    )
    break_even = next((total for total, mine, theirs in costs if theirs.cost < mine.cost), None)
    if break_even is None or break_even <= request.prevalence.total:
        return None
    calm, burst = planned.spend_at(thresholds_SK, [request.prevalence.total, break_even])
    return burst_rule(
        rounds,
        calm_rate=float(calm.reached_S[1] / calm.reached_S[0]),
        break_even_rate=float(burst.reached_S[1] / burst.reached_S[0]),
        first_groups=min(FIRST_GROUPS, window.images // rounds[0] - 1),
    )
