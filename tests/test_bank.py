"""Hash matches before any net: what is near a bank's entry is flagged; one that matches everything is not obeyed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pdqhash
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow
from PIL import ImageEnhance

from pipeline.errors import UsageError
from pipeline.plan import BankSpec, parse_plan
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.steps.bank import Banks, Frozen, freeze_banks, ignored_entries
from pipeline.steps.picture import decode_picture
from pipeline.store import Store
from pipeline.window import Image, Window
from tests.conftest import QUICK, small_plan
from tests.test_plan import content


def scene(seed: int, side: tuple[int, int] = (640, 480)) -> Pillow.Image:
    """A picture with enough in it for a hash: blurred patches."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Pillow.fromarray(patches).resize(side, Pillow.Resampling.BICUBIC)


def saved(picture: Pillow.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **({"quality": 92} | options))
    return buffer.getvalue()


def reference_hash(picture: Pillow.Image) -> str:
    """As a bank's maker has it: of the whole picture at full size."""
    bits, _ = pdqhash.compute(np.asarray(picture))
    return np.packbits(bits.astype(np.uint8)).tobytes().hex()


def distance(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()


@pytest.mark.parametrize("size", [(640, 480), (2000, 1500)])
def test_a_picture_has_the_hash_of_its_full_size(size):
    """Whatever the net's size is, and turned as its camera says; another picture is far away."""
    picture = scene(1, size)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    turned = picture.transpose(Pillow.Transpose.ROTATE_90)
    for payload in (saved(picture), saved(turned, exif=exif)):
        found = decode_picture(payload, 32, hashed=True)
        assert found.pixels.shape == (32, 32, 3) and found.pdq is not None
        assert distance(found.pdq[0], reference_hash(picture)) <= 10 and found.pdq[1] == 100
        assert distance(found.pdq[0], reference_hash(scene(2, size))) > 90
    assert decode_picture(saved(picture), 32).pdq is None
    flat = decode_picture(saved(Pillow.new("RGB", (300, 300), "navy")), 32, hashed=True)
    assert flat.pdq is not None and flat.pdq[1] < 50


def test_a_photograph_keeps_its_hash_when_it_is_copied(shared_data, tmp_path):
    """Real photographs, smaller, brighter and compressed again: near the original's hash, far from all others."""
    import tarfile

    with tarfile.open(shared_data / "photos.tar") as tar:
        members = [member for member in tar.getmembers() if member.isfile()][:25]
        pictures = [Pillow.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB") for member in members]
    originals = [reference_hash(picture) for picture in pictures]
    for number, picture in enumerate(pictures):
        copy = ImageEnhance.Brightness(picture.resize((300, 240))).enhance(1.1)
        pdq, quality = decode_picture(saved(copy, quality=60), 80, hashed=True).pdq
        apart = [distance(pdq, original) for original in originals]
        assert apart[number] <= 31 and quality >= 50
        assert min(value for other, value in enumerate(apart) if other != number) > 60


# Matching


def spec(**changes: Any) -> BankSpec:
    return BankSpec(**{"name": "b", "file": "unused", "category": "automobile"} | changes)


def banks(folder: Path, *entries: tuple[BankSpec, list[str]]) -> Banks:
    store = Store(str(folder / "out"))
    specs = []
    for number, (wanted, hashes) in enumerate(entries):
        path = folder / f"{number}.csv"
        path.write_text("hash,note\n" + "".join(f"{value},x\n" for value in hashes))
        specs.append(wanted.model_copy(update={"file": str(path)}))
    frozen = freeze_banks(specs, store, "m", None)
    return Banks(store, tuple(zip(specs, frozen, strict=True)), "plan-version")


def flipped(value: str, bits: int) -> str:
    return f"{int(value, 16) ^ ((1 << bits) - 1):064x}"


def window_of(hashes: list[tuple[str, int] | None]) -> tuple[Window, dict[int, tuple[str, int]]]:
    images = [Image(image_id=f"{number}", uri=f"u{number}", payload=b"x") for number in range(len(hashes))]
    pixels = np.arange(len(hashes), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    window = Window(shard=0, window=0, first_ordinal=0, images=images, pixels=pixels)
    return window, {id(image): found for image, found in zip(images, hashes, strict=True) if found}


RNG = np.random.default_rng(7)
ENTRIES = ["".join(f"{value:02x}" for value in RNG.integers(0, 256, 32)) for _ in range(500)]


def test_what_is_near_enough_and_good_enough_is_flagged(tmp_path):
    near = banks(tmp_path, (spec(), ENTRIES))
    hashes = [
        (ENTRIES[3], 100), (flipped(ENTRIES[4], 31), 50), (flipped(ENTRIES[5], 32), 100), (ENTRIES[6], 49), None,
    ]  # fmt: skip
    window, by_image = window_of(hashes)
    near.match(window, by_image)
    assert [image.outcome for image in window.images] == ["flagged", "flagged", None, None, None]
    (finding,) = window.images[1].findings
    assert (finding["match_bank"], finding["match_distance"], finding["match_quality"]) == ("b", 31, 50)
    assert finding["match_entry"] == ENTRIES[4] and finding["plan_version"] == "plan-version"
    assert window.images[1].payload is None and window.pixels[:, 0, 0, 0].tolist() == [2, 3, 4]
    (work,) = window.work
    assert (work.operator, work.images_in, work.tests, work.positive_tests, work.images_out) == ("match", 5, 4, 2, 3)


def test_an_entry_that_matches_too_much_is_reported_and_not_obeyed(tmp_path):
    """Four files of one entry, where three may: they go on to the nets. Another entry in the same window is obeyed."""
    hashes = [(flipped(ENTRIES[0], bits), 100) for bits in range(4)] + [(ENTRIES[1], 100)] * 5
    window, by_image = window_of(hashes)
    for image in window.images[5:]:
        image.sha256 = "the same file five times is one content"
    window.images[4].sha256 = window.images[5].sha256
    banks(tmp_path, (spec(), ENTRIES)).match(window, by_image)
    assert [image.outcome for image in window.images] == [None] * 4 + ["flagged"] * 5
    assert [image.match_ignored for image in window.images] == [True] * 4 + [False] * 5
    work = [{"operator": work.operator, "images_in": work.images_in} for work in window.work]
    assert ignored_entries(work) == {"b": {ENTRIES[0]: 4}}


def test_of_two_banks_of_a_category_the_nearest_match_counts_and_canaries_are_left_to_the_nets(tmp_path):
    two = banks(
        tmp_path, (spec(name="far"), [flipped(ENTRIES[0], 9)]), (spec(name="near"), [flipped(ENTRIES[0], 2)]),
        (spec(name="other", category="truck"), [ENTRIES[0]]),
    )  # fmt: skip
    window, by_image = window_of([(ENTRIES[0], 100)] * 2)
    window.images[1].canary = True
    two.match(window, by_image)
    assert [(found["match_bank"], found["match_distance"]) for found in window.images[0].findings] == [
        ("near", 2), ("other", 0),
    ]  # fmt: skip
    assert window.images[1].outcome is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("name\nx\n", "wanted Parquet or CSV with a column 'hash'"),
        ("hash\nabc\n", "'abc' is no PDQ hash of 64 hexadecimal digits"),
        ("hash\n", "there are no rows in it"),
        (None, "no such file"),
    ],
)
def test_files_that_are_no_bank_are_refused(tmp_path, body, words):
    path = tmp_path / "bank.csv"
    if body is not None:
        path.write_text(body)
    with pytest.raises(UsageError, match=words):
        freeze_banks([spec(file=str(path))], Store(str(tmp_path / "out")), "m", None)


def test_a_bank_is_read_from_parquet_and_kept_as_it_was(tmp_path):
    path = tmp_path / "bank.parquet"
    pq.write_table(pa.table({"hash": [value.upper() for value in ENTRIES[:3]] * 2}), path)
    store = Store(str(tmp_path / "out"))
    (frozen,) = freeze_banks([spec(file=str(path))], store, "m", None)
    assert isinstance(frozen, Frozen) and len(store.read(frozen.key, frozen.sha256)) == 3 * 32
    path.unlink()
    window, by_image = window_of([(ENTRIES[2], 90)])
    Banks(store, ((spec(), frozen),), "v").match(window, by_image)
    assert window.images[0].outcome == "flagged"


def test_banks_are_part_of_what_a_plan_decides():
    plain = parse_plan(content(), "test")
    category = plain.categories[0]
    bank = {"name": "b", "file": "b.csv", "category": category}
    with_bank = parse_plan(content(banks=[bank]), "test")
    other = parse_plan(content(banks=[bank | {"distance": 20}]), "test")
    assert len({plain.version, with_bank.version, other.version}) == 3
    with pytest.raises(UsageError, match="bank 'b' is of category 'nosuch'"):
        parse_plan(content(banks=[bank | {"category": "nosuch"}]), "test")
    with pytest.raises(UsageError, match="each bank needs a name of its own"):
        parse_plan(content(banks=[bank, bank]), "test")


def test_a_scan_flags_what_the_bank_knows_and_tests_the_rest(ray_session, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for number in range(24):
        (source / f"{number:02d}.jpg").write_bytes(saved(scene(number)))
    for number in range(5):  # one content under many names
        (source / f"flood-{number}.jpg").write_bytes(saved(scene(100), quality=70 + number))
    bank = tmp_path / "bank.csv"
    bank.write_text("hash\n" + "".join(reference_hash(scene(seed)) + "\n" for seed in (3, 8, 100, 999)))
    entry = {"name": "known", "file": str(bank), "category": "automobile"}
    plan = small_plan(tmp_path, QUICK, window={"images": 32}, banks=[entry])
    record = run_scan(ScanConfig(source=str(source), output=str(tmp_path / "out"), plan=str(plan), run_id="r"))
    assert record["taken"] == {"match known": 2} and record["counts"]["listed"] == 29
    ((ignored, images),) = record["ignored_entries"]["known"].items()
    assert images == 5 and distance(ignored, reference_hash(scene(100))) == 0
    assert record["stages"][0]["images_in"] == 27 and record["banks_sha256"].keys() == {"known"}
    ledger = pq.read_table(next((tmp_path / "out").glob("ledger/*/*.parquet")), partitioning=None).to_pylist()
    marked = {row["source_uri"].rsplit("/", 1)[1] for row in ledger if row["match_ignored"]}
    assert marked == {f"flood-{number}.jpg" for number in range(5)}
    rows = pq.read_table(next((tmp_path / "out").glob("flagged/*/*.parquet")), partitioning=None).to_pylist()
    matched = {row["source_uri"].rsplit("/", 1)[1]: row for row in rows if row["match_bank"]}
    assert set(matched) == {"03.jpg", "08.jpg"}
    row = matched["03.jpg"]
    assert row["match_entry"] == reference_hash(scene(3)) and row["match_distance"] <= 10
    assert (row["score"], row["decided_stage"], row["stages"], row["width"]) == (None, "match", [], 640)
    page = (tmp_path / "out/runs/r/report.html").read_text()
    assert "They were not obeyed there" in page and ignored in page and "hash match" in page
    assert json.loads((tmp_path / "out/runs/r.json").read_text())["plan"]["banks"][0]["distance"] == 31
