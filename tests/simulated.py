"""A world of tests whose truth is known: dependent, diluted by companions, with positives that come in clusters.

An image has evidence in the eyes of each net: how hard it is in itself (the same for all nets, and for all versions
of one picture alike) and what this net makes of it. A group's evidence is its strongest member's, a little less for
every doubling of the group, and what the companions blur: each of them in its own way, wherever it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from threadpoolctl import threadpool_limits

from pipeline.planning.calibration import Prevalence
from pipeline.planning.routes import Route
from pipeline.planning.scores import Arrangement, Candidate, Scores, to_logits, to_scores
from pipeline.training.blocks import screen_thresholds
from pipeline.training.calibrate import CalibrateConfig

LENGTH = 16
COMPANIONS = CalibrateConfig.companions
DEPENDENCE = 0.6
"""Of what makes a test err: the share of the variance that all nets have in common."""
BLUR = 0.4
OF_COMPANY = 0.7
"""Of the blur's variance: the share that comes with the companions, and stays with them from group to group."""
NETS = {"mini": (2.0, -1.8, 1.4), "group": (3.6, -3.6, 1.4), "large": (6.0, -6.0, 1.5)}
"""Mean evidence of a violating image, of another, and its standard deviation."""


def _candidate(name: str, size: int, gmac: float, kept: float | None = None) -> Candidate:
    return Candidate(
        name=name,
        model=name.split("-", maxsplit=1)[0],
        input_size=64,
        size=size,
        gmac=gmac,
        gmac_kept=kept,
        seconds=gmac / 100,
        seconds_kept=None if kept is None else kept / 100,
    )


CANDIDATES = [
    _candidate("mini", 1, 0.05),
    _candidate("group-16", 16, 1.6),
    _candidate("group-4", 4, 0.7, 0.4),
    _candidate("group-1", 1, 0.5, 0.4),
    _candidate("large", 1, 1.0),
]
PREVALENCE = Prevalence(mean_K=(0.005,), images=10_000)


class World:
    """Draws images and what the nets see in them. ``fainter``: of each category, by how much its evidence is less."""

    def __init__(self, seed: int, fainter: Sequence[float] = (0.0,)) -> None:
        self.rng = np.random.default_rng(seed)
        self.fainter = np.asarray(fainter)

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple("abc"[: len(self.fainter)])

    def images(self, clusters: int, negatives: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Labels (N, K), clusters (N,) and evidence (N, K) by net: positives first, whose categories take turns."""
        versions = self.rng.geometric(0.5, clusters).clip(max=5)
        cluster_N = np.concatenate([np.repeat(np.arange(clusters), versions), clusters + np.arange(negatives)])
        kinds = len(self.fainter)
        labels_NK = (cluster_N < clusters)[:, None] & (cluster_N[:, None] % kinds == np.arange(kinds))
        common_CK = self.rng.standard_normal((clusters + negatives, kinds))
        # Versions of one picture are nearly as hard as each other.
        hard_NK = np.sqrt(0.8) * common_CK[cluster_N] + np.sqrt(0.2) * self.rng.standard_normal(labels_NK.shape)
        evidence = {"company": self.rng.standard_normal(len(cluster_N))}
        for name, (violating, other, spread) in NETS.items():
            own_NK = self.rng.standard_normal(labels_NK.shape)
            noise_NK = np.sqrt(DEPENDENCE) * hard_NK + np.sqrt(1 - DEPENDENCE) * own_NK
            evidence[name] = np.where(labels_NK, violating - self.fainter, other) + spread * noise_NK
        return labels_NK, cluster_N, evidence

    def score(self, candidate: Candidate, evidence: Mapping[str, np.ndarray], image_BL: np.ndarray) -> np.ndarray:
        """(B, L / size, K)."""
        seen_BLK = evidence[candidate.model][image_BL]
        if candidate.size == 1:
            return to_scores(seen_BLK)
        best_BGK = seen_BLK.reshape(len(image_BL), -1, candidate.size, len(self.fainter)).max(axis=2)
        company_BG = evidence["company"][image_BL].reshape(len(image_BL), -1, candidate.size).sum(axis=2)
        company_BG /= np.sqrt(candidate.size)
        chance_BGK = self.rng.standard_normal(best_BGK.shape)
        blur_BGK = np.sqrt(OF_COMPANY) * company_BG[:, :, None] + np.sqrt(1 - OF_COMPANY) * chance_BGK
        return to_scores(best_BGK + BLUR * blur_BGK - 0.25 * np.log2(candidate.size))

    def blocks(self, hosts: np.ndarray, companions: np.ndarray, redraws: int) -> np.ndarray:
        """(B, L): each host at a random place among random companions; then blocks of companions only."""
        hosted_BL = self.rng.choice(companions, (redraws * len(hosts), LENGTH))
        hosted_BL[np.arange(len(hosted_BL)), self.rng.integers(0, LENGTH, len(hosted_BL))] = np.tile(hosts, redraws)
        clean_BL = self.rng.permutation(companions)[: len(companions) // LENGTH * LENGTH].reshape(-1, LENGTH)
        return np.concatenate([hosted_BL, clean_BL])


def calibrate(
    world: World, clusters: int, negatives: int, redraws: int = 3, screen_recalls: Sequence[float] = (0.98, 0.995)
) -> Scores:
    """What a calibration of this world would have written: of ``clusters`` unique positives, 40 % to search on."""
    labels_NK, cluster_N, evidence = world.images(clusters, negatives)
    order = world.rng.permutation(len(cluster_N))
    labels_NK, cluster_N = labels_NK[order], cluster_N[order]
    evidence = {name: seen_NK[order] for name, seen_NK in evidence.items()}
    half_N = (world.rng.random(clusters + negatives) >= 0.4)[cluster_N].astype(int)
    everyone = np.arange(len(order))[:, None]
    single = {c.name: world.score(c, evidence, everyone)[:, 0] for c in CANDIDATES if c.size == 1}
    arrangements = []
    positive_N = labels_NK.any(axis=1)
    for recall in (1.0, *screen_recalls):
        screen = "mini" if recall < 1 else None
        thresholds_K = screen_thresholds(single["mini"], labels_NK, half_N == 0, recall)
        there_N = (single["mini"] >= np.array(thresholds_K)).any(axis=1) | (screen is None)
        if min((there_N & ~positive_N & (half_N == half)).sum() for half in (0, 1)) < COMPANIONS:
            continue
        image_BL = np.concatenate(
            [
                world.blocks(np.flatnonzero(positive_N & mine), np.flatnonzero(~positive_N & mine), redraws)
                for mine in (there_N & (half_N == half) for half in (0, 1))
            ]
        )
        scores = {c.name: world.score(c, evidence, image_BL) for c in CANDIDATES if c.size > 1}
        thresholds = thresholds_K if screen else ()
        arrangements.append(Arrangement(image_BL=image_BL, scores=scores, screen=screen, screen_thresholds=thresholds))
    return Scores(
        categories=world.categories,
        candidates={candidate.name: candidate for candidate in CANDIDATES},
        uris=[str(number) for number in range(len(order))],
        labels_NK=labels_NK,
        half_N=half_N,
        cluster_N=cluster_N,
        single=single,
        arrangements=tuple(arrangements),
    )


class Truth:
    """A sample so large that it stands for the world: one version of each of many pictures."""

    def __init__(self, world: World, clusters: int = 20_000, negatives: int = 20_000) -> None:
        self.world = world
        labels_NK, cluster_N, self.evidence = world.images(clusters, negatives)
        positive_N = labels_NK.any(axis=1)
        self.hosts = np.flatnonzero(positive_N)[np.unique(cluster_N[positive_N], return_index=True)[1]]
        self.labels_HK = labels_NK[self.hosts]
        self.companions = np.flatnonzero(~positive_N)

    def recalls(self, route: Route, thresholds_SK: np.ndarray) -> list[float]:
        """By category, of pictures that no calibration has seen, among companions as the route's groups have them."""
        companions = self.companions
        if route.screened:
            seen_NK = self.evidence[route.steps[0].model][companions]
            companions = companions[(seen_NK >= thresholds_SK[0]).any(axis=1)]
        hosts = len(self.hosts)
        image_BL = self.world.rng.choice(companions, (hosts, LENGTH))
        place_B = self.world.rng.integers(0, LENGTH, hosts)
        image_BL[np.arange(hosts), place_B] = self.hosts
        passed_BK = np.ones(self.labels_HK.shape, dtype=bool)
        for step, thresholds_K in zip(route.steps, thresholds_SK, strict=True):
            found_BGK = to_logits(self.world.score(step, self.evidence, image_BL))
            passed_BK &= found_BGK[np.arange(hosts), place_B // step.size] >= thresholds_K
        return [float(passed_BK[own_B, k].mean()) for k, own_B in enumerate(self.labels_HK.T)]


def one_thread_each(processes: int) -> ProcessPoolExecutor:
    """Products this small are slower on two threads than on one."""
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=threadpool_limits, initargs=(1,))
