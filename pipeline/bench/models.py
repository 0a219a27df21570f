"""Group testing nets against each other: what they find and what they cost, at several prevalences.

The form is that of Table 1 of Liang and Zou (2021), on CIFAR-10 with one class as the rare one: a row
for each algorithm, design and prevalence, individual testing first. Thresholds are set on pictures held
out of train/, which no net has learnt from, and judged on test/.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from rich.table import Table

from models.card import ZOO
from pipeline.bench.group_plans import DESIGNS, INDIVIDUAL, Entry, Fitting, load_nets, make_entries
from pipeline.bench.measure import Report, Say, write_result, writing
from pipeline.bench.prevalence import Judge, Judged
from pipeline.errors import UsageError
from pipeline.labels.splits import LabelledPixels, read_splits
from pipeline.plan import parse_plan
from pipeline.training.machine import describe_machine, describe_versions


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Compares group testing nets with individual testing on labelled pictures of which one class is rare.

    Exit codes: 0 done, 2 wrong usage, missing data or nets.
    """

    data: Path
    """A tar, or a folder, with train/<class>/* and test/<class>/*."""
    json: Path | None = None
    """File to write the rows to."""
    plans: Path | None = None
    """Folder to write each row's plan to, as jobs.scan reads it."""
    plot: Path | None = None
    """Picture (SVG or PNG) of recall over cost at the first prevalence."""
    zoo: Path = ZOO
    """Folder with the nets."""
    nets: tuple[str, ...] = tuple(DESIGNS)
    """Group testing nets to compare."""
    category: str = "automobile"
    """The rare class: a folder's name and a category of every net."""
    prevalences: tuple[float, ...] = (0.001, 0.005, 0.01)
    """Shares of rare pictures to judge at."""
    target_recall: float = 0.95
    """Recall that the individual thresholds keep on the held-out pictures."""
    kept_share: float = 0.99
    """Share of what the individual net flags there that each group round keeps."""
    fit_redraws: int = 8
    """Groups of re-drawn negatives that host each rare picture when thresholds are set."""
    redraws: int = 3
    """The same when they are judged."""
    passes: int = 3
    """How often the negatives are shuffled into groups."""
    threads: int = 1
    """Threads of torch; a stage's actor has one."""
    gpu: bool = False
    """Test on the GPU instead, as far as ``images/s`` goes; costs are multiply-adds all the same."""
    seed: int = 1

    def __post_init__(self) -> None:
        unknown = sorted(set(self.nets) - set(DESIGNS))
        if unknown:
            raise UsageError(f"nets {', '.join(unknown)} are unknown; known are {', '.join(DESIGNS)}")
        for name in ("target_recall", "kept_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it is a share, above 0 and at most 1")
        if not self.prevalences or not all(0 < share < 1 for share in self.prevalences):
            raise UsageError(f"prevalences are {self.prevalences}; give shares between 0 and 1, as in 0.001 0.01")
        for name in ("fit_redraws", "redraws", "passes", "threads"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but it must be at least 1")

    @property
    def fitting(self) -> Fitting:
        return Fitting(
            category=self.category, target_recall=self.target_recall, kept_share=self.kept_share,
            redraws=self.fit_redraws, seed=self.seed,
        )  # fmt: skip


def bench_models(config: ModelsConfig, say: Say) -> dict[str, Any]:
    """The rows and what they were measured on. Raises UsageError."""
    torch.set_num_threads(config.threads)
    try:
        nets = load_nets(config.zoo, config.nets, config.category)
        held, judged = read_splits(config.data, config.category, nets[INDIVIDUAL].card.input_size)
        say(f"thresholds from {_described(held, config)} held out of train/, judged on {_described(judged, config)}")
        rows = judge_entries(config, make_entries(config.fitting, nets, held), judged, say)
    except ValueError as error:
        raise UsageError(str(error)) from error
    result = {
        "benchmark": "models",
        "machine": describe_machine(),
        "versions": describe_versions("torch", "numpy", "pillow"),
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "positives": int(judged.positive_N.sum()),
        "negatives": int((~judged.positive_N).sum()),
        "nets": {name: net.card.version for name, net in nets.items()},
        "rows": rows,
    }
    write_result(config.json, result)
    write_plans(config.plans, rows)
    plot_models(config.plot, result)
    return result


def _described(pictures: LabelledPixels, config: ModelsConfig) -> str:
    return f"{len(pictures.positive_N):,} pictures, {int(pictures.positive_N.sum()):,} {config.category}"


def judge_entries(
    config: ModelsConfig, entries: list[Entry], pictures: LabelledPixels, say: Say
) -> list[dict[str, Any]]:
    """Rows by prevalence; in each, individual testing first."""
    judge = Judge(
        pictures.pixels_NSS3, pictures.positive_N,
        passes=config.passes, redraws=config.redraws, seed=config.seed, threads=config.threads, gpu=config.gpu,
    )  # fmt: skip
    rows: dict[float, list[dict[str, Any]]] = {prevalence: [] for prevalence in config.prevalences}
    for entry in entries:
        for prevalence, beside in rows.items():
            judged = judge.judge(entry.plan, prevalence)
            beside.append(_row(entry, prevalence, judged, beside[0] if beside else None, config))
        costs = ", ".join(f"{beside[-1]['relative_cost']:.3f}" for beside in rows.values())
        say(f"{entry.name}: relative cost {costs}")
    return [row for beside in rows.values() for row in beside]


def _row(
    entry: Entry, prevalence: float, judged: Judged, individual: dict[str, Any] | None, config: ModelsConfig
) -> dict[str, Any]:
    first = entry.plan.stages[0]
    content = entry.plan.model_dump(mode="json")
    alone = {"recall": judged.recall, "gmac_per_image": judged.effort.gmac} if individual is None else individual
    return {
        **{key: value for key, value in vars(entry).items() if key != "plan"},
        "prevalence": prevalence,
        "group_size": first.rounds[0],
        "rounds": [size for stage in entry.plan.stages for size in stage.rounds],
        "groupings": first.groupings,
        "recall": judged.recall,
        "recall_interval": judged.recall_interval,
        "redraws": config.redraws if first.rounds[0] > 1 else 1,
        # A net that finds nothing at all gives no share of it.
        "relative_recall": judged.recall / alone["recall"] if alone["recall"] else None,
        "false_positive_rate": judged.false_positive_rate,
        "false_positive_rate_interval": judged.false_positive_rate_interval,
        "tests_per_image": judged.effort.tests,
        "gmac_per_image": judged.effort.gmac,
        "relative_cost": judged.effort.gmac / alone["gmac_per_image"],
        "seconds_per_1000_images": 1000 * judged.effort.seconds,
        "images_per_s": 1 / judged.effort.seconds,
        # The version that a run of this plan will state: it is a digest of what is read back.
        "plan_version": parse_plan(content, entry.name).version,
        "plan": content,
    }


def write_plans(folder: Path | None, rows: list[dict[str, Any]]) -> None:
    """Raises UsageError."""
    if folder is None:
        return
    for row in rows:
        path = folder / f"{row['name']}.yaml"
        with writing(path):
            path.write_text(yaml.safe_dump(row["plan"], sort_keys=False))


def models_report(result: dict[str, Any]) -> Report:
    config = result["config"]
    words = (
        f"Recall is of {result['positives']:,} unique positives, each hosted by {config['redraws']} groups of re-drawn "
        f"negatives, FPR of {result['negatives']:,} unique negatives; cost is GMAC over individual testing's."
    )
    named = {"rows": config["json"], "plans": config["plans"], "plot": config["plot"]}
    written = [f"{name}: {path}" for name, path in named.items() if path]
    return [*models_tables(result), words, *written]


def models_tables(result: dict[str, Any]) -> list[Table]:
    """One table a prevalence."""
    tables: dict[float, Table] = {}
    for row in result["rows"]:
        if row["prevalence"] not in tables:
            table = Table(title=f"prevalence {row['prevalence']:.3%}", title_justify="left")
            for column in ("net", "algorithm", "design", "rounds"):
                table.add_column(column, no_wrap=column == "net")
            for column in ("recall [95 %]", "relative", "FPR [95 %]", "tests/image", "GMAC/image", "cost", "images/s"):
                table.add_column(column, justify="right")
            tables[row["prevalence"]] = table
        tables[row["prevalence"]].add_row(
            row["net"],
            f"{row['algorithm']} {row['algorithm_name']}" if row["algorithm"] else row["algorithm_name"],
            f"{row['design']} {row['design_name']}" if row["design"] else "",
            _rounds(row),
            _with_interval(row["recall"], row["recall_interval"]),
            "" if row["relative_recall"] is None else f"{row['relative_recall']:.4f}",
            _with_interval(row["false_positive_rate"], row["false_positive_rate_interval"]),
            f"{row['tests_per_image']:.3f}",
            f"{row['gmac_per_image']:.5f}",
            f"{row['relative_cost']:.3f}",
            f"{row['images_per_s']:,.0f}",
        )
    return list(tables.values())


def plot_models(path: Path | None, result: dict[str, Any]) -> None:
    """Recall, with its interval, over relative cost at the first prevalence, as SVG or PNG. Raises UsageError.

    What recall says depends on what else is flagged: rows are hollow whose false positives are surely more than
    individual testing's.
    """
    if path is None:
        return
    individual = result["rows"][0]
    rows = [row for row in result["rows"] if row["prevalence"] == individual["prevalence"]]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    most = individual["false_positive_rate_interval"][1]
    colors = {net: f"C{number}" for number, net in enumerate(dict.fromkeys(row["net"] for row in rows))}
    for number, row in enumerate(rows):
        # A recall of 1 may be a sum that is a hair above the end of its interval.
        bounds = [[abs(row["recall"] - bound)] for bound in row["recall_interval"]]
        axes.errorbar(
            row["relative_cost"], row["recall"], yerr=bounds, fmt="o", elinewidth=0.6, color=colors[row["net"]],
            markerfacecolor="white" if row["false_positive_rate_interval"][0] > most else None,
        )  # fmt: skip
        # Above and below in turn: neighbours in cost are often neighbours in recall.
        offset, place = (5, -10 if number % 2 else 4), (row["relative_cost"], row["recall"])
        axes.annotate(_rounds(row), place, xytext=offset, textcoords="offset points", fontsize=7)
    for net, color in colors.items():
        axes.plot([], [], "o", color=color, label=net)
    axes.axhline(individual["recall"], color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.1)
    axes.set_xlabel("cost, GMAC over individual testing's")
    axes.set_ylabel("recall")
    title = f"prevalence {individual['prevalence']:.1%}, group sizes by round; dashed: individual testing"
    axes.set_title(f"{title}; hollow: more false positives than it", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    with writing(path):
        figure.savefig(path)


def _rounds(row: dict[str, Any]) -> str:
    sizes = " > ".join(str(size) for size in row["rounds"])
    return sizes if row["groupings"] == 1 else f"2 x {sizes}"


def _with_interval(value: float, bounds: tuple[float, float]) -> str:
    return f"{value:.4f} [{bounds[0]:.4f}, {bounds[1]:.4f}]"
