"""What the authors of neural group testing published of their tests: costs, and scores as candidates of a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.planning.scores import Arrangement, Candidate, Scores

# GMAC of the authors' tests, and of one that begins from features that are there (retests of a feature merge).
GMAC = {
    "K0": 16.5, "MIX2": 16.5, "MIX4": 16.5, "G1_2": 17.95, "G1_4": 20.85, "G1_8": 26.64, "G2_2": 20.16, "G2_4": 27.46,
    "G2_8": 42.06, "G2_16": 71.27, "G2_32": 129.68, "TREE_4": 23.05, "TREE_8": 33.25, "TREE_16": 53.65,
}  # fmt: skip
REUSED = 12.86
# Of the first and the second grouping of the one-round rows: as published, and with the costs of the nets they used.
GROUPINGS = {"TREE_4": [(23.05, 17.26), (23.05, 17.26)], "G2_8": [(33.25, 21.66), (42.06, REUSED)]}
# TREE_16 merges pairs behind layer1 and has kept no features of single images but those.
TREE_SINGLE_KEPT = 15.05
BLOCK = 32


def candidate(name: str, checkpoint: str, size: int) -> Candidate:
    """``kept`` where a larger test of the same checkpoint has the features: never across checkpoints."""
    kept = None
    if name == "TREE_1":
        kept = TREE_SINGLE_KEPT
    elif name.startswith(("G2", "TREE")) and name not in ("G2_32", "TREE_16"):
        kept = REUSED
    gmac = GMAC.get(name, GMAC["K0"])
    return Candidate(name=name, model=checkpoint, input_size=224, size=size, gmac=gmac, gmac_kept=kept)


def authors_scores(folder: Path, seed: int) -> Scores:
    """Their first order in blocks, each positive in the one group it has; half of the blocks are the search half.

    An image is in one block, so blocks split the images by id.
    """
    tests = pq.read_table(folder / "ngt/ngt_scores.parquet").to_pandas()
    ids = pq.read_table(folder / "ngt/ngt_image_ids.parquet").to_pandas()
    tests, ids = tests[tests.seed == 42], ids[ids.seed == 42].sort_values("position")
    blocks = len(ids) // BLOCK
    candidates, found = {}, {}
    for name, rows in tests.groupby("test", observed=True):
        ordered = rows.sort_values("group")
        candidates[name] = candidate(name, str(ordered["checkpoint"].iloc[0]), int(ordered["M"].iloc[0]))
        found[name] = ordered["score"].to_numpy(np.float32)[:, None]
    halves = np.random.default_rng(seed).permutation(np.arange(blocks) % 2)
    return Scores(
        categories=("violating",),
        candidates=candidates,
        uris=ids["image_id"].astype(str).tolist(),
        labels_NK=ids["target"].to_numpy()[:, None] == 1,
        half_N=halves.repeat(BLOCK),
        cluster_N=np.arange(len(ids)),
        single={name: scores_NK for name, scores_NK in found.items() if candidates[name].size == 1},
        arrangements=(
            Arrangement(
                image_BL=np.arange(len(ids)).reshape(blocks, BLOCK),
                scores={n: s.reshape(blocks, -1, 1) for n, s in found.items() if candidates[n].size > 1},
            ),
        ),
    )
