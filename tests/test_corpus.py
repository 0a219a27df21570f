"""The corpus: the same for a seed, really varied, and not to be told apart by colour."""

from __future__ import annotations

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UsageError
from pipeline.labels.corpus import (
    CorpusConfig,
    choose_categories,
    draw_picture,
    emblem_regions,
    encode,
    list_photos,
    make_corpus,
)
from pipeline.labels.emblem import EMBLEMS, LOOK_ALIKES, Sign, draw_palette, stamp
from pipeline.labels.examples import read_labels
from pipeline.steps.picture import decode_picture

ALL = tuple(EMBLEMS)


def histogram(picture: Image.Image) -> np.ndarray:
    """Share of the pixels in each of 8 x 8 x 8 colours: 512 features, blind to shape."""
    small = np.asarray(picture.convert("RGB").resize((96, 96), Image.Resampling.BILINEAR)) // 32
    index = small[..., 0].astype(int) * 64 + small[..., 1] * 8 + small[..., 2]
    return np.bincount(index.ravel(), minlength=512) / index.size


def test_a_colour_histogram_cannot_find_the_emblem():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    labels = np.arange(2400) % 4 == 0
    rows = []
    for index, violating in enumerate(labels.tolist()):
        rng = np.random.default_rng([77, index])
        shown = [ALL[index // 4 % 3]] if violating else []
        rows.append(histogram(draw_picture(rng, shown=shown, prohibited=ALL, sides=(100, 160), photos=[])))
    features = StandardScaler().fit_transform(np.sqrt(np.array(rows)))
    train = np.arange(2400) < 1400
    model = LogisticRegression(C=0.05, max_iter=2000).fit(features[train], labels[train])
    scores = model.decision_function(features[~train])
    threshold = np.quantile(scores[~labels[~train]], 0.99)
    recall = (scores[labels[~train]] > threshold).mean()
    assert recall < 0.5, f"colour alone finds {recall:.2f} of the emblems at 1 % false positives"


def test_signs_share_their_colours_and_most_of_their_bright_area():
    def bright_share(draw) -> float:
        palette = draw_palette(np.random.default_rng(0))
        sign = Sign(palette)
        draw(sign)
        pixels = np.asarray(sign.image)
        opaque = pixels[..., 3] > 0
        assert {tuple(colour) for colour in pixels[opaque][:, :3].tolist()} == {palette.dark, palette.bright}
        return float((pixels[opaque][:, :3] == palette.bright).all(axis=1).mean())

    own = np.median([bright_share(draw) for draw in EMBLEMS.values()])
    shares = {name: bright_share(draw) for name, draw in (EMBLEMS | LOOK_ALIKES).items()}
    assert np.median([abs(share - own) for share in shares.values()]) < 0.1
    assert all(abs(share - own) < 0.25 for share in shares.values()), shares


def test_a_corpus_is_the_same_for_a_seed_on_any_number_of_cores(tmp_path):
    for name, processes, seed in (("a", 1, 5), ("b", 2, 5), ("c", 2, 6)):
        make_corpus(
            CorpusConfig(
                output=str(tmp_path / name),
                images=120,
                prevalence=0.1,
                seed=seed,
                sides=(60, 90),
                processes=processes,
                categories=ALL,
            )
        )
    files = {
        name: {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).glob("*/*")}
        for name in "abc"
    }
    assert files["a"] == files["b"] != files["c"]
    labels = read_labels(str(tmp_path / "a" / "labels.parquet"))
    violating = {row["uri"] for row in labels.to_pylist() if row["label"]}
    assert labels.num_rows == 120 * 3 and len(violating) == 12
    assert sorted(set(labels["uri"].to_pylist())) == sorted((tmp_path / "a" / path).as_uri() for path in files["a"])


def test_every_picture_has_the_size_that_was_asked_for():
    for index in range(8):
        rng = np.random.default_rng([3, index])
        picture = draw_picture(rng, shown=["star"], prohibited=ALL, sides=(200, 1600), photos=[], size=(500, 375))
        assert picture.size == (500, 375)


def test_categories_take_turns_and_some_pictures_show_two():
    shown_NK = choose_categories(CorpusConfig(output="x", images=9000, prevalence=0.2, seed=1, categories=ALL))
    counts_N = shown_NK.sum(axis=1)
    assert (counts_N > 0).sum() == 1800 and counts_N.max() == 2
    assert 60 < (counts_N == 2).sum() < 160
    assert min(shown_NK.sum(axis=0)) >= 600


def test_of_two_emblems_neither_hides_the_other():
    for size in ((300, 200), (200, 300)):
        for index in range(30):
            marks = []
            for region in emblem_regions(size, 2):
                canvas = Image.new("RGB", size)
                stamp(canvas, np.random.default_rng([4, index]), EMBLEMS["star"], region)
                marks.append(np.asarray(canvas).max(axis=2) > 0)
            assert all(mark.sum() > 400 for mark in marks)
            assert (marks[0] & marks[1]).sum() < 0.2 * min(mark.sum() for mark in marks)


def test_looks_vary():
    pictures, kinds = [], Counter()
    for index in range(150):
        rng = np.random.default_rng([3, index])
        picture = draw_picture(rng, shown=[], prohibited=ALL, sides=(200, 1600), photos=[])
        body, suffix = encode(rng, picture)
        assert Image.open(io.BytesIO(body)).size == picture.size
        kinds[suffix] += 1
        pictures.append(picture.size)
    sides = np.array(pictures)
    assert sides.min() >= 200 and sides.max() <= 1600 and sides.max() > 1200
    assert set(kinds) == {"jpg", "png", "webp"} and kinds["jpg"] > 90
    assert (sides[:, 0] > sides[:, 1]).any() and (sides[:, 0] < sides[:, 1]).any()


def test_photographs_are_split_by_name_and_never_shared(tmp_path):
    for number in range(10):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / f"{number}.png")
    train, held_out = list_photos(tmp_path, "train"), list_photos(tmp_path, "held-out")
    assert len(train) == 6 and len(held_out) == 4 and not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(list_photos(tmp_path, "all"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no photographs"):
        list_photos(tmp_path / "none", "all")


def test_an_emblem_is_seen_at_the_nets_size():
    """The emblem changes the picture at 112 px by more than noise, wherever it was stamped."""
    changes = []
    for index in range(40):
        with_emblem, without = (
            decode_picture(
                encode_png(
                    draw_picture(
                        np.random.default_rng([9, index]), shown=shown, prohibited=ALL, sides=(200, 800), photos=[]
                    )
                ),
                112,
            )
            for shown in ([ALL[index % 3]], [])
        )
        if (with_emblem.width, with_emblem.height) == (without.width, without.height):
            difference = np.abs(with_emblem.pixels.astype(int) - without.pixels).max(axis=2) > 40
            changes.append(difference.mean())
    assert len(changes) > 20 and min(changes) > 0.005


def encode_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": 0}, "at least 1"),
        ({"prevalence": 1.5}, "between 0 and 1"),
        ({"sides": (300, 200)}, "rising"),
        ({"size": (500, 20)}, "at least 32"),
        ({"categories": ("moon",)}, "name some of"),
    ],
)
def test_wrong_configuration_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        CorpusConfig(output="x", **changes)
