"""Scans over real pictures from outside: CIFAR-10 with odd files among it, and photographs with emblems."""

from __future__ import annotations

import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

from pipeline.labels.corpus import CorpusConfig, make_corpus
from pipeline.plan import load_plan
from pipeline.run.scan import ScanConfig, run_scan
from pipeline.storage import s3_client
from tests.test_picture import BAD, GOOD, png_header, save, scene

pytestmark = pytest.mark.usefixtures("ray_session")

_exif = Pillow.Exif()
_exif[0x0112] = 6
ROTATED = save(scene(), "JPEG", exif=_exif)

# Good formats first; then what must end as an error, with its code.
ODD_GOOD = {
    "cmyk.jpg": GOOD["cmyk jpeg"][0],
    "sixteen bit.png": save(Pillow.linear_gradient("L").convert("I;16"), "PNG"),
    "animated.gif": GOOD["animated gif"][0],
    "animated.webp": GOOD["animated webp"][0],
    "rotated.jpg": ROTATED,
    "ünïcode 图片.jpg": GOOD["jpeg"][0],
    "spaces in the name.jpg": GOOD["jpeg"][0],
    "no suffix": GOOD["png"][0],
    "picture.txt": GOOD["jpeg"][0],
    "wrong suffix.png": GOOD["jpeg"][0],
    "palette.png": GOOD["palette png"][0],
    "bitmap.bmp": GOOD["bmp"][0],
    "scan.tiff": GOOD["tiff"][0],
    "new.avif": GOOD["avif"][0],
}
ODD_BAD = {
    "empty.jpg": (b"", "empty"),
    "truncated.jpg": (BAD["a truncated jpeg"][0], "truncated"),
    "truncated.png": (BAD["a truncated png"][0], "truncated"),
    "text named.jpg": (BAD["text"][0], "not_an_image"),
    "vast.png": (png_header(60_000, 60_000), "too_many_pixels"),
    "page.svg": (BAD["svg"][0], "not_an_image"),
}


def cifar_test_pictures(archive: Path, limit: int) -> dict[str, bytes]:
    """Name and bytes of the first ``limit`` test pictures."""
    pictures: dict[str, bytes] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            if "test/" in member.name and member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                pictures[member.name.split("test/", 1)[1]] = file.read()
                if len(pictures) == limit:
                    break
    return pictures


@pytest.mark.slow
def test_cifar_and_odd_files_are_all_accounted_for(shared_data, s3_endpoint, tmp_path):
    limit = 10_000
    pictures = cifar_test_pictures(shared_data / "cifar10.tar.xz", limit)
    assert len(pictures) == limit
    odd = ODD_GOOD | {name: body for name, (body, _) in ODD_BAD.items()}
    assert len(odd) == 20
    client = s3_client(s3_endpoint)
    bucket = f"cifar-{limit}"
    client.create_bucket(Bucket=bucket)
    for key, body in (pictures | {f"odd/{name}": body for name, body in odd.items()}).items():
        client.put_object(Bucket=bucket, Key=key, Body=body)
    record = run_scan(
        ScanConfig(source=f"s3://{bucket}/", output=str(tmp_path), endpoint_url=s3_endpoint, shard_size=3000)
    )
    assert record["status"] == "complete" and record["counts"]["listed"] == limit + 20
    ledger = pq.read_table(sorted(tmp_path.glob("ledger/scan_date=*/*.parquet")), partitioning=None).to_pylist()
    by_name = {row["source_uri"].split("/", 3)[3]: row for row in ledger}
    assert len(ledger) == len(by_name) == limit + 20
    assert set(by_name) == set(pictures) | {f"odd/{name}" for name in odd}
    for name in ODD_GOOD:
        assert by_name[f"odd/{name}"]["outcome"] in ("cleared", "flagged"), by_name[f"odd/{name}"]
    for name, (_, code) in ODD_BAD.items():
        row = by_name[f"odd/{name}"]
        assert (row["outcome"], row["error_code"], row["decided_stage"]) == ("error", code, None)
    assert record["counts"]["error"] == len(ODD_BAD)
    assert record["errors"] == Counter(code for _, code in ODD_BAD.values())
    assert all(row["group_score"] is not None for row in ledger if row["outcome"] == "cleared")


@pytest.mark.slow
def test_photographs_that_training_did_not_use(shared_data, s3_endpoint, tmp_path):
    photos = tmp_path / "photos"
    with tarfile.open(shared_data / "photos.tar") as tar:
        tar.extractall(photos, filter="data")
    client = s3_client(s3_endpoint)
    client.create_bucket(Bucket="photos")
    make_corpus(
        CorpusConfig(
            output="s3://photos/in",
            images=3000,
            prevalence=0.015,
            seed=12,
            categories=load_plan("emblem").categories,
            backgrounds=photos,
            backgrounds_part="held-out",
            endpoint_url=s3_endpoint,
        )
    )
    record = run_scan(
        ScanConfig(
            source="s3://photos/in/",
            output=str(tmp_path / "out"),
            endpoint_url=s3_endpoint,
            labels="s3://photos/in/labels.parquet",
        )
    )
    assert record["counts"]["listed"] == 3000 and record["counts"]["error"] == 0
    assert record["quality"]["positives"] == 45
    assert record["quality"]["recall"] >= 0.97
    assert record["quality"]["false_positive_rate"] <= 0.003
    assert record["relative_cost"] <= 0.35
