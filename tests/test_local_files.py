"""Fetching from a folder: what comes, what does not, and that no file waits for another that hangs."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.listing.source import file_etag
from pipeline.plan import Preparation
from pipeline.steps import fetch as module
from pipeline.steps.fetch import Fetcher
from pipeline.window import Image, Window


def listed(path: Path) -> Image:
    found = path.stat()
    return Image(image_id=path.name, uri=path.as_uri(), size_bytes=found.st_size, etag=file_etag(found))


def fetch(*images: Image, **limits: float) -> dict[str, Image]:
    window = Window(shard=0, window=0, first_ordinal=0, images=list(images))
    fetched = Fetcher(None, None, Preparation(**limits)).fetch(window).images
    return {image.image_id: image for image in fetched}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number:03}.jpg" for number in range(40)]
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
    return paths


def test_every_file_comes_with_its_own_bytes_and_digest(files, monkeypatch):
    async def nothing_left(self, images):
        pytest.fail(f"{len(images)} files were left to be fetched like objects")

    monkeypatch.setattr(Fetcher, "_fetch_all", nothing_left)
    fetched = fetch(*map(listed, files))
    for path in files:
        image = fetched[path.name]
        assert image.payload == path.read_bytes()
        assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_cannot_be_read_has_a_reason_of_its_own(files, tmp_path):
    images = [listed(path) for path in files]
    files[0].unlink()
    files[1].write_bytes(b"other")
    files[2].unlink()
    os.mkfifo(files[2])
    files[3].unlink()
    files[3].mkdir()
    images[4].size_bytes += 1
    images[5].uri = "gs://bucket/key.jpg"
    large = tmp_path / "large.jpg"
    large.write_bytes(bytes(1_000_001))
    images += [listed(large), Image(image_id="unlisted size", uri=large.as_uri())]
    fetched = fetch(*images, max_megabytes=1, fetch_seconds=3)
    assert {name: image.error_code for name, image in fetched.items() if image.error_code} == {
        "000.jpg": "fetch_not_found",
        "001.jpg": "fetch_changed",
        "002.jpg": "fetch_failed",
        "003.jpg": "fetch_failed",
        "004.jpg": "fetch_short",
        "005.jpg": "fetch_failed",
        "large.jpg": "too_large",
        "unlisted size": "too_large",
    }
    assert fetched["002.jpg"].error_detail == fetched["003.jpg"].error_detail == "not a regular file"
    assert all(
        image.payload == Path(files[0].parent, name).read_bytes() for name, image in fetched.items() if image.payload
    )
    assert sum(image.payload is not None for image in fetched.values()) == len(files) - 6


def test_a_file_that_hangs_holds_up_no_other_and_comes_too_late(files, monkeypatch):
    images = [listed(path) for path in files]
    read, released, late = module._read_file, threading.Event(), threading.Event()

    def reads(location, etag, limit):
        if not location.key.endswith("007.jpg"):
            return read(location, etag, limit)
        released.wait(30)
        try:
            return read(location, etag, limit)
        finally:
            late.set()

    monkeypatch.setattr(module, "_read_file", reads)
    began = time.monotonic()
    fetched = fetch(*images, fetch_seconds=6)
    assert time.monotonic() - began < 7.5, "the readers' time is a part of its deadline"
    assert {name for name, image in fetched.items() if image.payload is None} == {"007.jpg"}
    assert fetched["007.jpg"].error_code == "fetch_timeout"
    released.set()
    assert late.wait(10)
    time.sleep(0.1)
    assert fetched["007.jpg"].payload is None and fetched["007.jpg"].sha256 is None


def test_a_file_that_fails_once_is_read_again(files, monkeypatch):
    read, failed = module._read_file, []

    def reads(location, etag, limit):
        if location.key.endswith("003.jpg") and not failed:
            failed.append(location.key)
            raise module.FetchError("fetch_failed", "input/output error", may_pass=True)
        return read(location, etag, limit)

    monkeypatch.setattr(module, "_read_file", reads)
    fetch_all, left = Fetcher._fetch_all, []

    def seen(self, images):
        left.extend(image.image_id for image in images)
        return fetch_all(self, images)

    monkeypatch.setattr(Fetcher, "_fetch_all", seen)
    fetched = fetch(*map(listed, files))
    assert left == ["003.jpg"]
    assert failed and fetched["003.jpg"].payload == files[3].read_bytes()


def test_a_slow_mount_is_not_asked_twice_for_what_nobody_has_begun(files, monkeypatch):
    read, asked = module._read_file, []

    def reads(location, etag, limit):
        asked.append(location.key)
        time.sleep(0.2)
        return read(location, etag, limit)

    monkeypatch.setattr(module, "_read_file", reads)
    fetched = fetch(*map(listed, files), fetch_seconds=3, fetch_concurrency=8)
    assert all(fetched[path.name].payload == path.read_bytes() for path in files)
    # Two readers had a second for 40 files: those that they were at when it was over are asked for again, at most.
    assert len(files) <= len(asked) <= len(files) + 2


def test_a_mount_that_hangs_does_not_hold_a_window_for_ever(files, monkeypatch):
    monkeypatch.setattr(module, "HASTE_SECONDS", 0.3)
    released = threading.Event()
    monkeypatch.setattr(module, "_read_file", lambda *_: released.wait(60))
    began = time.monotonic()
    fetched = fetch(*map(listed, files), fetch_seconds=3, fetch_concurrency=8)
    released.set()
    assert {image.error_code for image in fetched.values()} == {"fetch_timeout"}
    # The readers' second and one round of eight take 3 s, four more 0.3 s each.
    assert time.monotonic() - began < 3 + 4 * 0.3 + 3


def test_a_file_that_grows_while_it_is_read_is_not_let_through(files, monkeypatch):
    files[0].write_bytes(bytes(999_999))
    found = os.stat

    def stat_and_write(path, *args, **options):
        result = found(path, *args, **options)
        if str(path) == str(files[0]):
            files[0].write_bytes(bytes(1_000_001))
        return result

    monkeypatch.setattr(module.os, "stat", stat_and_write)
    fetched = fetch(Image(image_id="grows", uri=files[0].as_uri()), max_megabytes=1)
    assert (fetched["grows"].error_code, fetched["grows"].payload) == ("too_large", None)
