"""The plan's nets as the driver looks at them before a run begins."""

from __future__ import annotations

from dataclasses import dataclass

from models.cost import gmac_per_test
from models.weights import load_net
from pipeline.device import accelerator
from pipeline.errors import UsageError
from pipeline.plan import Plan
from pipeline.stages import StageCost, check_stage, stage_cost


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
    """Loads every net once, here, so that a missing or unfit one is a clear line and not a dead actor.

    The device of stages with GPUs is asked for by name only: the driver's own node may have none.
    """
    if any(stage.num_gpus for stage in plan.stages):
        accelerator()
    versions, costs = {}, {}
    try:
        for stage in plan.stages:
            net, card = load_net(stage.model)
            check_stage(stage, plan.categories, net, card.categories)
            versions[stage.name] = (card.version, card.sha256)
            costs[stage.name] = stage_cost(stage, net)
    except (ValueError, RuntimeError, KeyError) as error:
        # RuntimeError and KeyError: weights that do not fit the card's trunk.
        raise UsageError(f"plan {plan.name!r}: {' '.join(str(error).split())[:300]}") from error
    individual_gmac = gmac_per_test(net, plan.stages[-1].input_size, 1)
    return Models(versions=versions, costs=costs, individual_gmac=individual_gmac)
