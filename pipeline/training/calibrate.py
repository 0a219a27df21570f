"""From labelled pictures to scores: every candidate test on every picture, and on groups that host the positives.

Pictures are split into halves by what they show, not by name, so that versions of one picture stay together. Within
a half each positive is hosted by blocks of re-drawn negatives, and other blocks hold negatives only. Behind a cheap net
groups are of what it lets through: such survivors attract each other, so they are grouped among themselves.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.cost import gmac_per_test
from models.weights import load_net
from pipeline import flow
from pipeline.errors import RunError, UsageError
from pipeline.labels.examples import UNKNOWN, LabelledPictures, is_reviews, read_known
from pipeline.plan import Actors, Pool
from pipeline.planning.scores import Arrangement, Candidate, Scores, check_halves, scores_bytes
from pipeline.run.cluster import ray_session
from pipeline.run.preflight import check_output
from pipeline.schema import SCORING
from pipeline.steps.device import accelerator
from pipeline.storage import check_endpoint, storage_errors_as_usage
from pipeline.store import Store
from pipeline.training.blocks import SEARCH, draw_blocks, find_versions, screen_thresholds, split
from pipeline.training.fit import read_pixels
from pipeline.training.machine import describe_machine, describe_versions

IMAGES_PER_ROW = 256
TIMED_PICTURES = 768
OUTPUT_PATIENCE = 300.0
"""Seconds for which writing is tried again: what took hours to score must not be lost to a minute's outage."""


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Scores labelled pictures with every candidate test, alone and in groups, for jobs.plan to choose from.

    Exit codes: 0 done, 1 it began and failed, 2 wrong usage, labels or nets.
    """

    labels: tuple[str, ...]
    """Labelled pictures, a random sample of what scans will see: labels files (Parquet: uri, category, label, each of
    0 or 1) or folders with a folder per class."""
    models: tuple[str, ...]
    """Candidate nets, NAME or NAME@PIXELS for another input size than the card's: a net of the zoo or a card's path."""
    search_labels: tuple[str, ...] = ()
    """More labelled pictures that may be a biased sample, as reviews of flagged ones are (``OUT/reviews`` for
    what stands in an output): the search learns from them, nothing is certified on them."""
    categories: tuple[str, ...] = ()
    """What to look for; default: what all candidates score."""
    output: str = "scores.parquet"
    """File to write: local, or s3://."""
    search_share: float = 0.4
    """Share of the pictures that thresholds are searched on; the others certify."""
    redraws: int = 4
    """How often each positive is given other companions."""
    passes: int = 2
    """How often the negatives are shuffled into blocks without a positive."""
    screen_recalls: tuple[float, ...] = (0.98, 0.995)
    """Groups behind a net that tests images alone are of what it lets through when it keeps these shares of the
    positives. None: such plans are not looked for."""
    screens: int = 1
    """How many of the cheapest candidates of single images are tried as such."""
    companions: int = 500
    """Fewest negatives of a half that companions are drawn from. With few, all positives stand beside the same ones,
    and what is certified is their recall beside these."""
    cache: Path = Path("out/examples")
    """Folder for decoded pictures; on a cluster all nodes must see it."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    gpu: bool = False
    """Score on GPUs, one an actor."""
    actors: int = 0
    """Actors that score; default: one a CPU of this machine, or one GPU."""
    seed: int = 1
    """Of halves and companions."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if self.gpu:
            accelerator()  # or a misspelt one would be found when labels have been read
        for source in filter(is_reviews, self.labels):
            raise UsageError(
                f"labels {source}: reviews are a biased sample, and certify nothing; give them as --search-labels"
            )
        if not 0.1 <= self.search_share <= 0.9:
            raise UsageError(f"search share is {self.search_share:g}, but both halves need at least a tenth")
        for name in ("redraws", "passes", "companions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        if not all(0 < recall < 1 for recall in self.screen_recalls):
            raise UsageError(f"screen recalls are {self.screen_recalls}; give shares between 0 and 1, as in 0.98 0.995")

    @property
    def pool(self) -> Pool:
        actors = self.actors or (1 if self.gpu else os.cpu_count() or 1)
        return Pool(num_cpus=1, num_gpus=float(self.gpu), actors=Actors(min=1, max=actors))


def calibrate(config: CalibrateConfig, say: Callable[[str], None]) -> Scores:
    """Raises UsageError on labels or nets that cannot be calibrated with, RunError when scoring fails."""
    categories, candidates = find_candidates(config.models, config.categories, gpu=config.gpu)
    pictures, biased_N = read_pictures(config, categories, say)
    sides = sorted({candidate.input_size for candidate in candidates})
    violating = int(pictures.labels_NK.any(axis=1).sum())
    say(f"{len(pictures.uris):,} pictures, {violating:,} of them violating, at {sides} pixels")
    with ray_session([config.pool], "calibrating"):
        pixels = {side: str(read_pixels(pictures.uris, side, config.cache, config.endpoint_url)) for side in sides}
        cluster_N = find_versions(np.load(pixels[sides[0]], mmap_mode="r"), pictures)
        half_N = split(cluster_N, pictures.labels_NK, biased_N, config.search_share, config.seed)
        check_halves(categories, pictures.labels_NK, half_N)
        scorer = _Scorer(config, categories, pixels)
        say(f"timing {len(candidates)} candidates")
        candidates = scorer.time(candidates)
        alone = [candidate for candidate in candidates if candidate.size == 1]
        answers = scorer.score([(candidate, np.arange(len(pictures.uris))[:, None]) for candidate in alone])
        scores = Scores(
            categories=categories,
            candidates={candidate.name: candidate for candidate in candidates},
            uris=pictures.uris,
            labels_NK=pictures.labels_NK,
            half_N=half_N,
            cluster_N=cluster_N,
            single={candidate.name: scores_NK for candidate, scores_NK in zip(alone, answers, strict=True)},
            facts={
                "labels": config.labels,
                "search_labels": config.search_labels,
                "seed": config.seed,
                "redraws": config.redraws,
                "machine": describe_machine(),
                "versions": describe_versions("dorfman", "torch", "onnxruntime", "ray"),
            },
        )
        # A net whose scores are no numbers has been refused before groups, which take hours, are scored.
        arrangements = _arrange(config, candidates, scores, scorer, say)
        decode_seconds = {side: _time_decoding(config, pictures, side) for side in sides}
    return replace(scores, arrangements=tuple(arrangements), decode_seconds=decode_seconds)


def run_calibrate(config: CalibrateConfig, say: Callable[[str], None]) -> Scores:
    """Calibrates and writes the file, for which there must be room before anything is scored."""
    store, name = Store.around(config.output, config.endpoint_url, patience=OUTPUT_PATIENCE)
    if not name.endswith(".parquet"):
        raise UsageError(f"output is {config.output!r}: give the name of a .parquet file")
    with storage_errors_as_usage():
        check_output(store)
    scores = calibrate(config, say)
    store.write(name, scores_bytes(scores))
    return scores


def find_candidates(
    models: Sequence[str], categories: Sequence[str] = (), *, gpu: bool = False
) -> tuple[tuple[str, ...], list[Candidate]]:
    """The categories, and every group size of every net. Raises UsageError."""
    found: list[Candidate] = []
    scored: tuple[str, ...] = tuple(categories)
    for entry in dict.fromkeys(models):
        name, _, side = entry.partition("@")
        if side and not (side.isdigit() and 16 <= int(side) <= 2048):
            raise UsageError(f"model {entry!r}: write NAME@PIXELS with 16 to 2048 pixels, as in emblem@112")
        try:
            net, card = load_net(name)
        except ValueError as error:
            raise UsageError(str(error)) from error
        scored = scored or card.categories
        missing = sorted(set(scored) - set(card.categories))
        if missing:
            raise UsageError(f"model {name!r} scores {list(card.categories)}, not {missing}: leave it out, or them")
        pixels = int(side) if side else card.input_size
        if card.int8 and (gpu or pixels != card.input_size):
            raise UsageError(
                f"model {entry!r} is one in int8, for CPUs and pictures of {card.input_size} pixels: leave out "
                f"{'--gpu' if gpu else f'@{pixels}'}, or give the model that it was made of"
            )
        largest = net.group_sizes[-1]
        short = Path(name).stem if name.endswith(".json") else name
        found += [
            Candidate(
                name=f"{short}@{pixels}" + (f"x{size}" if size > 1 else ""),
                model=name,
                input_size=pixels,
                size=size,
                gmac=gmac_per_test(net, pixels, size),
                gmac_kept=gmac_per_test(net, pixels, size, reused_from=largest) if size < largest else None,
            )
            for size in net.group_sizes
        ]
    names = [candidate.name for candidate in found]
    if len(set(names)) < len(names):
        raise UsageError(f"candidates are called {sorted(names)}: give nets of different names")
    return scored, found


def read_pictures(
    config: CalibrateConfig, categories: tuple[str, ...], say: Callable[[str], None]
) -> tuple[LabelledPictures, np.ndarray]:
    """All pictures once, in an order that means nothing, and which of them are a biased sample.

    What reviews and labels say of one picture is put together. One that nobody has said everything of is left out: it
    may be violating, and would stand among the companions.
    """
    sources = (*config.labels, *config.search_labels)
    uris, known_NK, source_N = read_known(sources, categories, config.endpoint_url)
    complete_N = (known_NK != UNKNOWN).all(axis=1)
    if not complete_N.all():
        row = int(np.argmin(complete_N))
        lacking = [name for name, label in zip(categories, known_NK[row], strict=True) if label == UNKNOWN]
        say(
            f"{int((~complete_N).sum()):,} of {len(uris):,} pictures are left out, for they lack a label of some "
            f"category: {uris[row]} of {', '.join(lacking)}; label it 0 or 1, or leave categories out with --categories"
        )
    if not complete_N.any():
        raise UsageError(f"labels: no picture has a label of each category {list(categories)}; name fewer of them")
    absent = [
        name for name, known_N in zip(categories, known_NK[complete_N].T, strict=True) if not (known_N == 1).any()
    ]
    if absent:
        raise UsageError(
            f"labels: no picture shows {', '.join(absent)}, so nothing can be said of its recall; label some, or name "
            "the others with --categories"
        )
    order = np.random.default_rng(config.seed).permutation(np.flatnonzero(complete_N))
    biased_N = source_N[order] >= len(config.labels)
    return LabelledPictures(uris=[uris[row] for row in order], labels_NK=known_NK[order] == 1), biased_N


def _arrange(
    config: CalibrateConfig,
    candidates: Sequence[Candidate],
    alone: Scores,
    scorer: _Scorer,
    say: Callable[[str], None],
) -> list[Arrangement]:
    labels_NK, half_N, single = alone.labels_NK, alone.half_N, alone.single
    groups = [candidate for candidate in candidates if candidate.size > 1]
    if not groups:
        return []
    # Blocks hold whole groups of every size.
    length = int(np.lcm.reduce([candidate.size for candidate in groups]))
    rng = np.random.default_rng([config.seed, 2])
    alone_of = [candidate for candidate in candidates if candidate.size == 1]
    # A net in int8 has the multiply-adds of the one it was made of.
    cheapest = sorted(alone_of, key=lambda candidate: (candidate.gmac, candidate.seconds or 0.0))[: config.screens]
    wanted: list[tuple[str | None, tuple[float, ...], np.ndarray]] = [(None, (), np.ones(len(half_N), dtype=bool))]
    for screen in cheapest:
        for recall in config.screen_recalls:
            scores_NK = single[screen.name]
            thresholds_K = screen_thresholds(scores_NK, labels_NK, half_N == SEARCH, recall)
            wanted.append((screen.name, thresholds_K, np.any(scores_NK >= np.array(thresholds_K), axis=1)))
    drawn = []
    for name, thresholds, there_N in wanted:
        try:
            image_BL = draw_blocks(
                np.any(labels_NK, axis=1), half_N, there_N, length, config.redraws, config.passes, rng,
                companions=config.companions,
            )  # fmt: skip
        except ValueError as error:
            say(f"no groups{f' behind {name}' if name else ''}: {error}; label more pictures without any category")
            continue
        drawn.append((name, thresholds, image_BL))
    if not drawn:
        return []
    say(f"scoring {sum(len(blocks) for *_, blocks in drawn):,} blocks of {length} with {len(groups)} candidates")
    jobs = [(candidate, blocks.reshape(-1, candidate.size)) for *_, blocks in drawn for candidate in groups]
    answers = iter(scorer.score(jobs))
    return [
        Arrangement(
            image_BL=image_BL,
            scores={c.name: next(answers).reshape(len(image_BL), length // c.size, -1) for c in groups},
            screen=name,
            screen_thresholds=thresholds,
        )
        for name, thresholds, image_BL in drawn
    ]


class _Scorer:
    """Candidates on the actor pool."""

    def __init__(self, config: CalibrateConfig, categories: tuple[str, ...], pixels: dict[int, str]) -> None:
        self.pool, self.categories = config.pool, categories
        self.made_of = (pixels, categories, accelerator() if config.gpu else None)

    def score(self, jobs: Sequence[tuple[Candidate, np.ndarray]]) -> list[np.ndarray]:
        """Scores (G, K) of each candidate for its groups (G, M)."""
        rows: list[dict[str, Any]] = []
        places: list[tuple[int, int]] = []
        for job, (candidate, members_GM) in enumerate(jobs):
            groups = max(1, IMAGES_PER_ROW // candidate.size)
            for start in range(0, len(members_GM), groups):
                rows.append(_row(len(rows), candidate, members_GM[start : start + groups]))
                places.append((job, start))
        found = [np.full((len(members_GM), len(self.categories)), np.nan, np.float32) for _, members_GM in jobs]
        missing = len(rows)
        for row in self._run(rows):
            job, start = places[row["job"]]
            scores_GK = np.array(row["scores"], np.float32).reshape(-1, len(self.categories))
            found[job][start : start + len(scores_GK)] = scores_GK
            missing -= 1
        if missing:
            raise RunError(f"{missing:,} of {len(rows):,} batches did not come back from Ray; start again")
        return found

    def time(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same with their seconds."""
        timed = {row["job"]: row for row in self._run([_row(job, c, None) for job, c in enumerate(candidates)])}
        return [
            replace(candidate, seconds=timed[job]["seconds"], seconds_kept=timed[job]["seconds_kept"])
            for job, candidate in enumerate(candidates)
        ]

    def _run(self, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        return flow.score_rows(pa.Table.from_pylist(rows, SCORING), self.made_of, self.pool)


def _row(job: int, candidate: Candidate, members_GM: np.ndarray | None) -> dict[str, Any]:
    return {
        "job": job,
        "model": candidate.model,
        "side": candidate.input_size,
        "size": candidate.size,
        "members": None if members_GM is None else members_GM.ravel().tolist(),
    }


def _time_decoding(config: CalibrateConfig, pictures: LabelledPictures, side: int) -> float:
    """Seconds to decode one picture, the median over batches on as many actors as score."""
    # Violating pictures may be of another kind: the sample is of all.
    uris = pictures.uris[:TIMED_PICTURES]
    batches = []
    for row in flow.read_pictures(uris, side, config.endpoint_url, config.pool):
        pictures_read = min(len(uris) - row["first"], len(row["pixels"] or b"") // (3 * side * side))
        batches.append(row["decode_seconds"] / max(1, pictures_read))
    return statistics.median(batches)
