"""The plan's nets as the driver looks at them before a run begins, by their cards: without torch."""

from __future__ import annotations

from dataclasses import dataclass

from models.card import Card, read_card, read_weights
from models.cost import NetCost, segment_gmac
from pipeline.errors import UsageError
from pipeline.plan import Plan, StageSpec
from pipeline.steps.device import accelerator


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """GMAC of one test: of each round, where the later ones reuse what the first one kept; of a round whose tests reuse
    nothing, the first and the one that a window falls back to; and of one in the second grouping."""

    rounds: tuple[float, ...]
    fresh: dict[int, float]
    regroup: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the run must know of the plan's nets: by stage (version, sha256) and cost, and the last one's cost alone."""

    versions: dict[str, tuple[str, str]]
    costs: dict[str, StageCost]
    individual_gmac: float

    @property
    def weights_sha256(self) -> dict[str, str]:
        return {stage: digest for stage, (_, digest) in self.versions.items()}


def check_models(plan: Plan) -> Models:
    """Reads every card and checks its weights' digest: a missing or unfit net is a clear line, and no dead actor.

    A net whose card does not tell its cost at the stage's size is loaded, to count. Raises UsageError.
    """
    if plan.asks_for_gpus:
        # By name only: the driver's own node may have none.
        accelerator()
    versions, costs = {}, {}
    try:
        for stage in plan.stages:
            card = read_card(stage.model)
            read_weights(card, stage.model)
            check_stage(stage, plan.categories, card)
            net_cost = _cost(card, stage)
            versions[stage.name] = (card.version, card.sha256)
            costs[stage.name] = stage_cost(stage, net_cost)
    except (ValueError, RuntimeError, KeyError) as error:
        # RuntimeError and KeyError: weights that do not fit the card's trunk.
        raise UsageError(f"plan {plan.name!r}: {' '.join(str(error).split())[:300]}") from error
    return Models(versions=versions, costs=costs, individual_gmac=net_cost.per_test(1))


def _cost(card: Card, stage: StageSpec) -> NetCost:
    if card.segment_gmac and stage.input_size == card.input_size:
        return NetCost(card.segment_gmac, card.merge_points)
    from models.weights import load_net  # noqa: PLC0415  torch, and its compiler to count with: seconds

    return NetCost(segment_gmac(load_net(stage.model)[0], stage.input_size), card.merge_points)


def stage_cost(spec: StageSpec, cost: NetCost) -> StageCost:
    first = spec.rounds[0]
    rounds = (cost.per_test(first), *(cost.per_test(part, reused_from=first) for part in spec.rounds[1:]))
    fresh = {0: rounds[0]}
    if spec.burst is not None:
        fresh[spec.rounds.index(spec.burst.group_size)] = cost.per_test(spec.burst.group_size)
    regroup = rounds[0] - first * cost.embedding() if spec.groupings == 2 else 0.0
    return StageCost(rounds=rounds, fresh=fresh, regroup=regroup)


def check_stage(spec: StageSpec, categories: tuple[str, ...], card: Card) -> None:
    """Raises ValueError when the net cannot do what the stage asks of it."""
    missing = set(categories) - set(card.categories)
    if missing:
        raise ValueError(
            f"stage {spec.name!r}: model {spec.model!r} scores {list(card.categories)}, not {sorted(missing)}"
        )
    impossible = [size for size in spec.rounds if size not in card.group_sizes]
    if impossible:
        raise ValueError(
            f"stage {spec.name!r}: model {spec.model!r} tests groups of {list(card.group_sizes)}, not {impossible}"
        )
    if card.int8:
        _check_int8(spec, card)


def _check_int8(spec: StageSpec, card: Card) -> None:
    for name, given, right in (
        ("input_size", spec.input_size, card.input_size),
        ("dtype", spec.dtype, "float32"),
        ("num_gpus", spec.num_gpus, 0),
    ):
        if given != right:
            raise ValueError(
                f"stage {spec.name!r}: {name} is {given}, but model {spec.model!r} is one in int8, for CPUs and "
                f"pictures of {card.input_size} pixels: give {name} {right}, or the model that it was made of"
            )
