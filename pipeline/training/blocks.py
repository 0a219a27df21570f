"""Who stands beside whom: pictures in halves, versions of one together, and in each half blocks that share groups."""

from __future__ import annotations

import hashlib

import numpy as np

from pipeline.errors import UsageError
from pipeline.labels.examples import LabelledPictures
from pipeline.planning.calibration import highest_keeping
from pipeline.planning.scores import HALVES

SEARCH, CERTIFY = range(len(HALVES))


def _check_same(uris: list[str], labels_NK: np.ndarray, first: int, row: int) -> None:
    if (labels_NK[first] != labels_NK[row]).any():
        names = f"{uris[first]} and {uris[row]}, which show the same pixels,"
        raise UsageError(
            f"labels: {names} are labelled differently ({labels_NK[first].astype(int).tolist()} and "
            f"{labels_NK[row].astype(int).tolist()}): correct one of them"
        )


def find_versions(pixels_NSS3: np.ndarray, pictures: LabelledPictures) -> np.ndarray:
    """Numbers (N,) that pictures of the same pixels share. Raises UsageError when these are labelled differently."""
    first: dict[bytes, int] = {}
    cluster_N = np.empty(len(pixels_NSS3), dtype=np.int64)
    for row, pixels_SS3 in enumerate(pixels_NSS3):
        cluster_N[row] = first.setdefault(hashlib.blake2b(pixels_SS3.tobytes(), digest_size=16).digest(), row)
        _check_same(pictures.uris, pictures.labels_NK, int(cluster_N[row]), row)
    return cluster_N


def split(
    cluster_N: np.ndarray, labels_NK: np.ndarray, biased_N: np.ndarray, search_share: float, seed: int
) -> np.ndarray:
    """The half (N,) of each picture. Versions stay together; of every combination of labels each half has its share.

    A biased picture is for the search, unless the fair sample has a version of it: it goes where that one goes.
    """
    rng = np.random.default_rng([seed, 1])
    half_N = np.full(len(cluster_N), SEARCH)
    only_biased = np.setdiff1d(cluster_N, cluster_N[~biased_N])
    patterns_N = np.unique(labels_NK, axis=0, return_inverse=True)[1].ravel()
    for pattern in np.unique(patterns_N):
        clusters = rng.permutation(np.setdiff1d(cluster_N[patterns_N == pattern], only_biased))
        # At least one to each half, where there are two.
        first = min(max(round(search_share * len(clusters)), 1), max(len(clusters) - 1, 0))
        half_N[np.isin(cluster_N, clusters[first:])] = CERTIFY
    return half_N


def screen_thresholds(
    scores_NK: np.ndarray, labels_NK: np.ndarray, searched_N: np.ndarray, recall: float
) -> tuple[float, ...]:
    """Per category the highest score that keeps ``recall`` of the search half's positives."""
    return tuple(
        highest_keeping(scores_N[searched_N & labels_N], recall)
        for scores_N, labels_N in zip(scores_NK.T, labels_NK.T, strict=True)
    )


def draw_blocks(
    positive_N: np.ndarray,
    half_N: np.ndarray,
    there_N: np.ndarray,
    length: int,
    redraws: int,
    passes: int,
    rng: np.random.Generator,
    *,
    companions: int = 1,
) -> np.ndarray:
    """Blocks (B, L) of one half each: every positive there at a random place among negatives, ``redraws`` times, then
    the negatives alone in ``passes`` orders. Raises ValueError when a half's negatives do not fill a block, or are
    fewer than ``companions``."""
    blocks = []
    for half, name in enumerate(HALVES):
        hosts = np.flatnonzero(there_N & positive_N & (half_N == half))
        negatives = np.flatnonzero(there_N & ~positive_N & (half_N == half))
        if len(negatives) < length:
            raise ValueError(f"{len(negatives)} negatives of the {name} half do not fill a block of {length}")
        if len(negatives) < companions:
            raise ValueError(f"{len(negatives)} negatives of the {name} half are fewer than {companions} companions")
        for _ in range(redraws):
            for host in hosts:
                block_L = rng.choice(negatives, length, replace=False)
                block_L[rng.integers(length)] = host
                blocks.append(block_L)
        for _ in range(passes):
            order = rng.permutation(negatives)
            blocks += list(order[: len(order) // length * length].reshape(-1, length))
    return np.array(blocks)
