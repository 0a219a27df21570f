"""Training: what is drawn, what stays fixed, what a kill costs, and what is said about bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.cli import parse
from models.backbone import Trunk
from models.group_net import GroupNet, MergePoint
from models.training import (
    Examples,
    GroupSampler,
    Progress,
    Trainer,
    TrainingConfig,
    augment,
    read_checkpoint,
    score_groups,
    train,
    warm_decay,
    write_checkpoint,
)
from models.weights import load_net
from pipeline.errors import RunError, UsageError
from pipeline.labels.examples import label_folder, read_labelled, split_off
from pipeline.schema import LABELS
from pipeline.storage import s3_client
from pipeline.store import Store
from pipeline.training.fit import TrainConfig, fit

ROOT = Path(__file__).resolve().parents[1]
POINTS = (MergePoint(cut="stem", size=2), MergePoint(cut="layer1", size=2))


def examples(count: int = 120) -> Examples:
    """Pictures that are brighter in the middle when they show "a", at the rim when "b"."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
    labels = np.zeros((count, 2), dtype=bool)
    labels[: count // 4, 0] = labels[count // 4 : count // 3, 1] = True
    pixels[labels[:, 0], 10:22, 10:22] += 130
    pixels[labels[:, 1], :6] += 130
    return Examples(pixels_NSS3=pixels, labels_NK=labels, categories=("a", "b"))


def net(points: tuple[MergePoint, ...] = POINTS) -> GroupNet:
    torch.manual_seed(5)
    return GroupNet(Trunk("late_resnet_mini", 2), points)


def config(**changes) -> TrainingConfig:
    return TrainingConfig(
        **({"steps": 12, "images_per_step": 16, "group_shares": (0.4, 0.3, 0.3), "threads": 1} | changes)
    )


def weights(trained: GroupNet) -> torch.Tensor:
    return torch.cat([value.float().flatten() for value in trained.state_dict().values()])


def test_groups_are_drawn_as_configured():
    labels = examples(600).labels_NK
    sampler = GroupSampler(labels, config(positive_share=0.5, hard_share=0.3), seed=1)
    sampler.hard = sampler.negatives[:5]
    members = sampler.draw(2000, 8)
    shown = labels[members]
    positives = shown.any(axis=2).sum(axis=1)
    assert 0.46 < (positives > 0).mean() < 0.54 and positives.max() == 2
    assert 0.06 < (positives[positives > 0] == 2).mean() < 0.15
    # "b" is three times rarer than "a", and drawn as often.
    assert 0.8 < shown[..., 0].sum() / shown[..., 1].sum() < 1.25
    hard = np.isin(members[~shown.any(axis=2)], sampler.hard).mean()
    assert 0.28 < hard < 0.34


def test_where_every_picture_shows_something_they_are_drawn_as_they_come():
    labels = np.eye(3, dtype=bool)[np.arange(90) % 3]
    members = GroupSampler(labels, config(), seed=1).draw(500, 1)
    assert set(members.ravel().tolist()) == set(range(90))


def test_a_net_learns_every_group_size():
    trained = train(Trainer(net(), examples(), config(steps=80, images_per_step=32, ema_decay=0.9, learning_rate=5e-3)))
    data = examples()
    negatives, positives = np.flatnonzero(~data.labels_NK.any(axis=1)), np.flatnonzero(data.labels_NK[:, 0])
    for size in (1, 2, 4):
        clean = np.random.default_rng(1).choice(negatives, (30, size))
        hosted = clean.copy()
        hosted[:, -1] = positives
        scores = [score_groups(trained, data.pixels_NSS3, groups)[:, 0] for groups in (clean, hosted)]
        assert np.median(scores[1]) > np.quantile(scores[0], 0.95), size


def test_a_short_training_is_no_average_of_its_beginnings():
    """With the default of 0.998 from the first step on, the average of 40 steps would be the net as it was initialised
    for nine tenths."""
    trainer = Trainer(net(), examples(), config(steps=40, learning_rate=5e-3))
    start = weights(net())
    while trainer.steps_done < 40:
        trainer.step()
    moved, behind = (weights(trainer.net) - start).norm(), (weights(trainer.net) - weights(trainer.average)).norm()
    assert behind < 0.3 * moved
    assert [warm_decay(0.998, steps) for steps in (1, 90, 10_000)] == [2 / 11, 0.91, 0.998]


def test_frozen_segments_and_statistics_stay():
    start = net().state_dict()
    trainer = Trainer(net(), examples(), config(frozen=("stem",), frozen_statistics=True))
    trained = train(trainer).state_dict()
    for key, value in start.items():
        fixed = ".stem." in key or key.endswith(("running_mean", "running_var"))
        assert torch.equal(trained[key], value) == (fixed or key.endswith("num_batches_tracked")), key


def test_the_teacher_is_in_the_targets():
    teacher = net(()).eval()
    data = examples()
    trainer = Trainer(net(), data, config(distillation=0.25), teacher=teacher)
    scores = torch.from_numpy(score_groups(teacher, data.pixels_NSS3, np.arange(120)[:, None]))
    assert torch.allclose(trainer.targets_NK, 0.75 * torch.from_numpy(data.labels_NK).float() + 0.25 * scores)
    with pytest.raises(ValueError, match="no teacher"):
        Trainer(net(), data, config(distillation=0.25))


def test_bf16_trains_and_leaves_float32_weights():
    trainer = Trainer(net(), examples(), config(bf16=True, steps=3))
    trained = train(trainer)
    assert all(value.dtype == torch.float32 for value in trained.parameters())
    assert torch.isfinite(weights(trained)).all()


@pytest.mark.parametrize("views", ["upright", "any way up"])
def test_augmentation_keeps_the_picture(views):
    images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8).repeat(20, 1, 1, 1)
    seen = augment(images, torch.Generator().manual_seed(1), config(views=views, shift=0.2))
    assert seen.shape == images.shape and not torch.equal(seen, images)
    still = augment(images, torch.Generator().manual_seed(1), config(views=views))
    gain = (still.amax((1, 2, 3)) - still.amin((1, 2, 3))) / (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    assert gain.min() > 0.8 and gain.max() < 1.2
    upright = still[:, 0, -1, 0] > still[:, 0, 0, 0]
    assert upright.all() if views == "upright" else len(upright) == 40


def test_interrupted_and_restored_equals_undisturbed(tmp_path):
    data, path = examples(), tmp_path / "t.pt"
    settings = config(hard_share=0.3, hard_searches=2)
    undisturbed = train(Trainer(net(), data, settings))
    trainer = Trainer(net(), data, settings)
    for _ in range(7):
        trainer.step()
    write_checkpoint(trainer, path, {"history": [1]})
    del trainer
    later = Trainer(net(), data, settings)
    assert read_checkpoint(later, path) == {"history": [1]} and later.steps_done == 7
    assert torch.allclose(weights(train(later)), weights(undisturbed), atol=1e-5)
    with pytest.raises(ValueError, match="other settings of learning_rate"):
        read_checkpoint(Trainer(net(), data, config(hard_share=0.3, hard_searches=2, learning_rate=0.1)), path)


def test_a_loss_that_is_no_number_is_said():
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: lower the learning rate of 1e\+30"):
        train(Trainer(net(), examples(), config(learning_rate=1e30, steps=60)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hard_share": 1.0}, "below 1"),
        ({"steps": 0}, "at least 1"),
        ({"group_shares": ()}, "give each group size its share"),
        ({"group_shares": (1.0, 1.0, 1.0, 1.0)}, "the net's sizes are"),
        ({"frozen": ("layer9",)}, "not among"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Trainer(net(), examples(), config(**changes))


def folder_per_class(root: Path, count: int = 40) -> Path:
    data = examples(count)
    for index, (pixels, shown) in enumerate(zip(data.pixels_NSS3, data.labels_NK, strict=True)):
        folder = root / ("a" if shown[0] else "b" if shown[1] else "nothing")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


def job(root: Path, output: Path, **changes) -> TrainConfig:
    settings = {
        "name": "n",
        "labels": (str(root),),
        "validation": (str(root),),
        "categories": ("a", "b"),
        "trunk": "late_resnet_mini",
        "merge_points": ("stem:2", "layer1:2"),
        "input_size": 32,
        "output": output,
        "cache": output / "cache",
        "checkpoint_every": 5,
        "training": config(),
    }
    return TrainConfig(**(settings | changes))


def test_a_folder_per_class_becomes_a_net_with_card_and_curves(tmp_path, ray_session):
    seen = []
    card = fit(job(folder_per_class(tmp_path / "data"), tmp_path / "out", about="a test"), seen.append)
    loaded, same = load_net(str(tmp_path / "out" / "n.json"))
    assert loaded.group_sizes == (1, 2, 4) and same == card
    assert [row["group_size"] for row in card.facts["measured"]] == [1, 1, 2, 2, 4, 4]
    assert card.facts["data"]["positives"] == {"a": 10, "b": 3} and card.facts["about"] == "a test"
    assert set(card.facts["gmac_per_test"]) == {"1", "2", "4"}
    assert seen[-1].step == 12 and set(seen[-1].measured) == {1, 2, 4}
    curves = (tmp_path / "out" / "n.svg").read_text()
    assert curves.startswith("<?xml") and "recall at 1 % FPR" in curves
    assert not list((tmp_path / "out" / "cache" / "checkpoints").iterdir())


def test_a_folder_in_s3_is_read_like_a_local_one(tmp_path, s3_endpoint, ray_session):
    s3_client(s3_endpoint).create_bucket(Bucket="labelled")
    store = Store("s3://labelled/set", s3_endpoint)
    for path in folder_per_class(tmp_path / "data").rglob("*.png"):
        store.write(str(path.relative_to(tmp_path / "data")), path.read_bytes())
    local = read_labelled((str(tmp_path / "data"),), ("a", "b"))
    remote = read_labelled(("s3://labelled/set/",), ("a", "b"), s3_endpoint)
    assert np.array_equal(local.labels_NK, remote.labels_NK)
    first, second = (
        job(Path(), tmp_path / name, labels=(source,), validation=(), validation_share=0.4, endpoint_url=endpoint)
        for name, source, endpoint in (("x", str(tmp_path / "data"), None), ("y", "s3://labelled/set/", s3_endpoint))
    )
    for mine, theirs in zip(first.load(), second.load(), strict=True):
        assert np.array_equal(mine.open().pixels_NSS3, theirs.open().pixels_NSS3)
        assert np.array_equal(mine.labels_NK, theirs.labels_NK)


def test_the_split_depends_on_class_and_name_alone(tmp_path):
    here = read_labelled((str(folder_per_class(tmp_path / "here")),), ("a",))
    there = read_labelled((str(folder_per_class(tmp_path / "else" / "there")),), ("a",))
    kept, held = split_off(here, 0.3)
    assert 4 <= len(held.uris) <= 20 and len(kept.uris) + len(held.uris) == 40
    assert not set(kept.uris) & set(held.uris)
    names = [[uri.rsplit("/", 1)[1] for uri in split_off(part, 0.3)[1].uris] for part in (here, there)]
    assert names[0] == names[1]


def test_bad_input_is_named(tmp_path, ray_session):
    root = folder_per_class(tmp_path / "data")
    with pytest.raises(UsageError, match=r"no folder is called weapon; there are a, b, nothing"):
        label_folder(str(root), ("weapon", "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="there are no pictures in it"):
        label_folder(str(tmp_path / "empty"), ("a",))
    rows = [{"uri": f"file://{root}/a/000.png", "category": "a", "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows, LABELS), tmp_path / "one.parquet")
    with pytest.raises(UsageError, match="none of the 1 pictures is labelled without category 'a'"):
        fit(job(root, tmp_path / "o", labels=(str(tmp_path / "one.parquet"),), categories=("a",)), print)
    (root / "nothing" / "bad.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(UsageError, match=r"bad\.jpg: (not_an_image|truncated).*remove it from the labels"):
        fit(job(root, tmp_path / "o"), print)
    (root / "nothing" / "bad.jpg").unlink()
    with pytest.raises(RunError, match="lower the learning rate"):
        fit(job(root, tmp_path / "o", training=config(learning_rate=1e30, steps=60)), print)
    for changes, words in (
        ({"merge_points": ("layer1",)}, "write CUT:SIZE"),
        ({"merge_points": ("nowhere:2",)}, "nowhere"),
        ({"trunk": "resnet17"}, "unknown"),
        ({"teacher": "x"}, "belong together"),
        ({"validation_share": 0.0}, "between 0 and 1"),
        ({"workers": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            job(root, tmp_path / "o", **changes).build_net()


def flags(root: Path, output: Path, name: str) -> list[str]:
    values = {
        "--name": name,
        "--labels": str(root),
        "--validation": str(root),
        "--trunk": "late_resnet_mini",
        "--input-size": "32",
        "--output": str(output),
        "--cache": str(output / "cache"),
        "--threads": "1",
        "--steps": "300",
        "--images-per-step": "32",
        "--checkpoint-every": "30",
    }
    return [*sum(values.items(), ()), "--categories", "a", "b"]


def test_killed_and_started_again_it_ends_like_one_left_alone(tmp_path, ray_session):
    root = folder_per_class(tmp_path / "data", 120)
    out = tmp_path / "out"
    fit(parse("jobs.train", TrainConfig, flags(root, out, "alone")), print)
    command = [sys.executable, "-m", "jobs.train", *flags(root, out, "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    checkpoint = out / "cache" / "checkpoints" / "killed.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert checkpoint.exists() and not (out / "killed.json").exists()
    seen: list[Progress] = []
    fit(parse("jobs.train", TrainConfig, flags(root, out, "killed")), seen.append)
    assert seen[0].step > 30, "it began from the start"
    alone, resumed = (load_net(str(out / f"{name}.json"))[0] for name in ("alone", "killed"))
    assert torch.allclose(weights(alone), weights(resumed), atol=1e-4)


@pytest.mark.slow
def test_two_workers_train_one_net(tmp_path, ray_session):
    root = folder_per_class(tmp_path / "data", 120)
    seen = []
    card = fit(job(root, tmp_path / "out", workers=2, training=config(threads=1)), seen.append)
    assert seen[-1].step == 12 and card.facts["hardware"].startswith("2 x 1 threads")
    assert load_net(str(tmp_path / "out" / "n.json"))[0].group_sizes == (1, 2, 4)
    with pytest.raises(RunError, match="lower the learning rate"):
        fit(job(root, tmp_path / "o", workers=2, training=config(learning_rate=1e30, steps=60, threads=1)), print)
