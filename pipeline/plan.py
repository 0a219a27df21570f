"""The plan: which nets test an image, in which groups, against which thresholds. A YAML file.

What decides a verdict (window, stages, models, rounds, thresholds, input sizes, dtype) and what only
decides how fast it comes (actors, CPUs, GPUs, windows per call, batch) stand side by side per stage;
``Plan.version`` is a digest of the first kind alone. ``audit`` and ``certificate`` change no verdict either.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.documents import Strict, parse_document, parse_yaml
from pipeline.errors import UsageError

OPERATORS = {"fetch", "decode", "match", "write"}
"""Names that records and tables use for what is no stage."""
PLANS = Path(str(files("pipeline"))) / "plans"


class WindowSpec(Strict):
    """When a window is full: at ``images``, or before it holds more than ``megabytes`` as listed."""

    images: int = Field(default=256, ge=1)
    megabytes: int = Field(default=256, ge=1)


class Actors(Strict):
    """Bounds of an actor pool."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Actors:
        if self.max < self.min:
            raise ValueError(f"actors max is {self.max}, below min {self.min}")
        return self


class Pool(Strict):
    """The actors that run one operator: how fast verdicts come, never what they are."""

    actors: Actors = Actors()
    num_cpus: float = Field(default=1.0, ge=0)
    """Of one actor, and so of its threads and child processes."""
    num_gpus: float = Field(default=0.0, ge=0)
    """Of one actor. Pools that take fractions share a GPU and its memory."""
    resources: dict[str, float] = Field(default_factory=dict)
    """Of one actor, by names that some nodes advertise: says on which of them it may run."""
    windows_per_call: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check_needs(self) -> Pool:
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus is {self.num_gpus:g}, but an actor has a fraction of one GPU or whole ones")
        for name, amount in self.resources.items():
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"resources name {name!r}, which Ray counts itself; set num_cpus or num_gpus")
            if amount <= 0:
                raise ValueError(f"resources: {name} is {amount:g}; give more than 0, or leave it out")
        return self

    @property
    def needs(self) -> dict[str, float]:
        """What Ray must have free on one node for an actor, by Ray's names; nothing that is zero."""
        needs = {"CPU": self.num_cpus, "GPU": self.num_gpus} | self.resources
        return {kind: amount for kind, amount in needs.items() if amount}


class BurstRule(Strict):
    """When a window falls back to smaller groups: its own first groups say that violating images are not rare in it."""

    first_groups: int = Field(ge=1)
    """How many of the window's first groups, in ordinal order, are looked at. They are always tested as planned."""
    positive: int = Field(ge=1)
    """From how many positive ones among them the window falls back."""
    group_size: int = Field(ge=1)
    """The round in which the window's other groups are tested from then on, instead of the first: its group size."""

    @model_validator(mode="after")
    def _check(self) -> BurstRule:
        if self.positive > self.first_groups:
            raise ValueError(
                f"positive is {self.positive}, but only {self.first_groups} first groups are looked at; "
                f"give 1 to {self.first_groups}, or more first_groups"
            )
        return self


class StageSpec(Pool):
    """One net with its rounds, run by one actor pool."""

    name: str
    model: str
    """Name of a net in the zoo, or the path of its card."""
    rounds: tuple[int, ...]
    """Group sizes in the order they are tested, each dividing the one before."""
    groupings: Literal[1, 2] = 1
    """In how many different groups each image is tested: with 2, only what is positive in both goes on."""
    thresholds: dict[str, tuple[float, ...]]
    """Per category one score a round: a test is positive when any category reaches its own."""
    input_size: int = Field(ge=16, le=2048)
    """Side in pixels of the net's input."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_images: int = Field(default=64, ge=1)
    """Images in one device batch, rounded down to whole groups."""
    burst: BurstRule | None = None
    """Without a rule every window is tested in all rounds."""

    @model_validator(mode="after")
    def _check(self) -> StageSpec:
        if not self.rounds or any(size < 1 for size in self.rounds):
            raise ValueError(f"stage {self.name!r}: rounds are {self.rounds}; give group sizes, as in [16, 4]")
        for larger, smaller in zip(self.rounds, self.rounds[1:], strict=False):
            if smaller >= larger or larger % smaller:
                raise ValueError(
                    f"stage {self.name!r}: a round of {smaller} cannot follow one of {larger}; "
                    "each size must be smaller and divide the one before"
                )
        if self.groupings == 2 and (len(self.rounds) > 1 or self.rounds[0] == 1):
            raise ValueError(
                f"stage {self.name!r}: two groupings are one round of groups, not rounds of {list(self.rounds)}; "
                "put further rounds into a stage of their own"
            )
        if not self.thresholds:
            raise ValueError(f"stage {self.name!r}: thresholds name no category")
        for category, values in self.thresholds.items():
            if len(values) != len(self.rounds):
                raise ValueError(
                    f"stage {self.name!r}: category {category!r} has {len(values)} thresholds "
                    f"for {len(self.rounds)} rounds; give one a round"
                )
            if any(not 0 <= value <= 1 for value in values):
                raise ValueError(f"stage {self.name!r}: thresholds of {category!r} are {values}, not all in 0..1")
        return self

    @model_validator(mode="after")
    def _check_burst(self) -> StageSpec:
        if self.burst is None:
            return self
        if self.groupings == 2:
            raise ValueError(
                f"stage {self.name!r}: a burst rule needs rounds to fall back to, and {self.groupings} groupings are "
                "one round; leave out burst, or group once"
            )
        if self.burst.group_size not in self.rounds[1:]:
            raise ValueError(
                f"stage {self.name!r}: burst.group_size is {self.burst.group_size}, but the rounds behind the first "
                f"are of {list(self.rounds[1:])}; give one of these, or leave out burst"
            )
        return self


class Preparation(Strict):
    """How images are fetched, decoded and written. Its limits are verdicts too: beyond them is an error."""

    max_megabytes: int = Field(default=64, ge=1)
    """Larger objects are not fetched."""
    max_megapixels: int = Field(default=120, ge=1)
    """Larger pictures are not decoded."""
    decode_seconds: float = Field(default=20.0, gt=0)
    """A decoder that takes longer for one picture is killed."""
    decode_gigabytes: float = Field(default=2.0, gt=0)
    """Address space of one decoder beyond what it has when it starts."""
    max_frames: int = Field(default=1000, ge=1)
    """Animations and documents with more are not decoded. Of the others the first frame is tested."""
    fetch_seconds: float = Field(default=60.0, gt=0)
    """A request that fails or stalls is sent again for this long."""
    fetch_concurrency: int = Field(default=32, ge=1)
    """Requests in flight in one fetch actor; a quarter as many threads read local files: more for a slow mount."""
    fetch: Pool = Pool(num_cpus=0.25)
    decode: Pool = Pool(num_cpus=1.0)
    """Each actor has one child process that decodes."""
    jpeg: Literal["child", "device"] = "child"
    """What decodes JPEG: a child process that can be killed, or, for trusted sources alone, the actor's GPU."""
    write: Pool = Pool(num_cpus=0.1, windows_per_call=4)


class BankSpec(Strict):
    """A bank of PDQ hashes of known content: what matches one of them is flagged before any net has seen it."""

    name: str
    file: str
    """Parquet or CSV with a column ``hash`` (64 hexadecimal digits), local or in S3."""
    category: str
    distance: int = Field(default=31, ge=0, le=64)
    """Bits of 256 by which a match may differ; 31 is the usual one for PDQ."""
    quality: int = Field(default=50, ge=0, le=100)
    """Pictures whose hash has less are not matched: flat ones look alike to it."""
    most: int = Field(default=3, ge=1)
    """Different files of one window that may match one entry. When more do, it is reported there, and not obeyed."""


class Audit(Strict):
    """With which probability a cleared image is put into the audit table, for people to look at."""

    rate: float = Field(default=0.001, gt=0, le=1)
    near_rate: float = Field(default=0.01, gt=0, le=1)
    """Of an image whose clearing test came near a threshold, because that is where misses are."""

    @model_validator(mode="after")
    def _check(self) -> Audit:
        if self.near_rate < self.rate:
            raise ValueError(
                f"audit near_rate is {self.near_rate:g}, below rate {self.rate:g}: misses lie near the thresholds, "
                "so give near_rate at least as much"
            )
        return self


class Certificate(Strict):
    """What calibration has shown of the plan: per category the recall that it keeps with this confidence."""

    recall: dict[str, float]
    confidence: float = Field(gt=0, lt=1)
    prevalence: dict[str, float] = Field(default_factory=dict)
    """Share of violating images that was planned for."""
    positives: dict[str, int] = Field(default_factory=dict)
    """Violating images that the bound was computed from."""

    @model_validator(mode="after")
    def _check(self) -> Certificate:
        if any(not 0 <= bound <= 1 for bound in self.recall.values()):
            raise ValueError(f"certificate: recall bounds are {self.recall}, not all in 0..1")
        return self


class Plan(Strict):
    """Ordered stages. What the last stage finds positive is flagged."""

    name: str
    categories: tuple[str, ...]
    window: WindowSpec = WindowSpec()
    preparation: Preparation = Preparation()
    stages: tuple[StageSpec, ...] = Field(min_length=1)
    banks: tuple[BankSpec, ...] = ()
    audit: Audit = Audit()
    certificate: Certificate | None = None
    fused: Pool | None = None
    """For nodes without GPUs: one pool whose actors run all operators, each for windows of its own, so that nothing
    passes through the object store. What the operators' own pools say is not read then."""

    @model_validator(mode="after")
    def _check(self) -> Plan:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names) or not all(names):
            raise ValueError(f"stage names are {names}; each stage needs a name of its own")
        taken = [name for name in names if name in OPERATORS or ":" in name]
        if taken:
            raise ValueError(
                f"stages are called {taken}, but {sorted(OPERATORS)} and names with a colon are operators'"
            )
        for stage in self.stages:
            if set(stage.thresholds) != set(self.categories):
                raise ValueError(
                    f"stage {stage.name!r} has thresholds for {sorted(stage.thresholds)}, "
                    f"but the plan's categories are {sorted(self.categories)}"
                )
            if self.window.images % stage.rounds[0]:
                raise ValueError(
                    f"window.images is {self.window.images}, not a multiple of the groups of "
                    f"{stage.rounds[0]} in stage {stage.name!r}"
                )
            groups = self.window.images // stage.rounds[0]
            if stage.burst is not None and stage.burst.first_groups >= groups:
                raise ValueError(
                    f"stage {stage.name!r}: burst.first_groups is {stage.burst.first_groups}, but a window has no more "
                    f"than {groups} groups, so none could fall back; look at fewer, or give larger windows"
                )
        asking = [stage.name for stage in self.stages if stage.num_gpus]
        if self.fused and (asking or self.fused.num_gpus):
            raise ValueError(
                f"fused is for plans without GPUs, but {asking or 'it'} ask for some: leave out fused, or num_gpus"
            )
        if self.preparation.jpeg == "device":
            if self.fused or not self.preparation.decode.num_gpus:
                raise ValueError(
                    "preparation.jpeg is device, but decoders have no GPU: give preparation.decode num_gpus, and leave "
                    "out fused"
                )
            if self.banks:
                raise ValueError(
                    "preparation.jpeg is device, but only the child hashes pictures for banks: leave it out"
                )
        banks = [bank.name for bank in self.banks]
        if len(set(banks)) != len(banks) or not all(banks):
            raise ValueError(f"bank names are {banks}; each bank needs a name of its own")
        for bank in self.banks:
            if bank.category not in self.categories:
                raise ValueError(
                    f"bank {bank.name!r} is of category {bank.category!r}, but the plan's are {sorted(self.categories)}"
                )
        certified = set(self.certificate.recall) if self.certificate else set()
        if not certified <= set(self.categories):
            raise ValueError(
                f"the certificate has bounds for {sorted(certified)}, "
                f"but the plan's categories are {sorted(self.categories)}"
            )
        return self

    @property
    def asks_for_gpus(self) -> bool:
        return any(pool.num_gpus for pool in (*self.stages, self.preparation.decode))

    @property
    def version(self) -> str:
        """Twelve hexadecimal digits that change with whatever can change a verdict."""
        speed_only = {*Pool.model_fields, "batch_images"}
        limits = {
            "max_megabytes", "max_megapixels", "max_frames", "fetch_seconds", "decode_seconds", "decode_gigabytes"
        }  # fmt: skip
        # Plans that were made before there were burst rules, or banks, keep their version.
        stages = [
            stage.model_dump(mode="json", exclude=speed_only | ({"burst"} if stage.burst is None else set()))
            for stage in self.stages
        ]
        without = {"preparation", "stages", "audit", "certificate", "fused"} | (set() if self.banks else {"banks"})
        if self.preparation.jpeg != "child":
            limits |= {"jpeg"}  # another decoder: a score near a threshold may fall to its other side
        content = self.model_dump(mode="json", exclude=without) | {
            "limits": self.preparation.model_dump(include=limits),
            "stages": stages,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def load_plan(name: str) -> Plan:
    """A shipped plan by name, or a YAML file by path. Raises UsageError."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PLANS / f"{name}.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        shipped = ", ".join(sorted(entry.stem for entry in PLANS.glob("*.yaml")))
        raise UsageError(f"plan {path}: {error.strerror}; shipped plans are {shipped}") from error
    return parse_plan(parse_yaml(text, f"plan {path}"), str(path))


def parse_plan(content: dict, origin: str) -> Plan:
    return parse_document(Plan, content, f"plan {origin}")
