"""JPEG on the device of a plan, rehearsed on the CPU: the same pictures, errors and order as from the guarded child."""

from __future__ import annotations

import tarfile

import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline.errors import UsageError
from pipeline.plan import Preparation, parse_plan
from pipeline.steps import decode_device
from pipeline.steps.decode import Decoder
from pipeline.steps.decode_device import DeviceDecoder
from pipeline.window import Window
from tests.conftest import QUICK
from tests.test_picture import GOOD, save, scene, window

DEVICES = [pytest.param("cpu", id="rehearsed"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


def turned(orientation: int) -> bytes:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    return save(scene(size=(480, 320)), "JPEG", quality=95, exif=exif)


ODD = {
    "empty": b"",
    "no picture": b"\xff\xd8\xff but no JPEG\xff\xd9",
    "truncated": GOOD["jpeg"][0][:-40],
    "png": GOOD["png"][0],
    "cmyk": GOOD["cmyk jpeg"][0],
    "grey": save(scene("L"), "JPEG"),
    "bytes behind the end": GOOD["jpeg"][0] + b"more",
}


def both(device: str, side: int, *payloads: bytes) -> tuple[Window, Window]:
    windows = window(*payloads), window(*payloads)
    Decoder("decode", side, Preparation())([windows[0]])
    DeviceDecoder("decode", side, Preparation(), device)([windows[1]])
    return windows


def verdicts(found: Window) -> list[tuple]:
    return [(image.outcome, image.error_code, image.format, image.width, image.height) for image in found.images]


@pytest.mark.parametrize("device", DEVICES)
def test_the_order_stays_and_what_is_unusual_ends_as_in_the_child(device):
    ordinary = [GOOD["jpeg"][0], GOOD["progressive jpeg"][0], *(turned(number) for number in range(1, 9))]
    mixed = [file for pair in zip(ordinary, [*ODD.values(), *ODD.values()], strict=False) for file in pair]
    child, there = both(device, 32, *mixed)
    assert verdicts(there) == verdicts(child)
    assert {code for _, code, *_ in verdicts(there)} >= {"empty", "not_an_image", "truncated", None}
    assert child.pixels is not None and there.pixels is not None and there.pixels.shape == child.pixels.shape
    apart = np.abs(there.pixels.astype(int) - child.pixels).mean(axis=(1, 2, 3))
    # Edges of pure red and blue are where decoders differ most in how they spread colours over pixels.
    assert apart.max() < 3, apart


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", [80, 224])
def test_photographs_are_within_half_a_grey_level(device, side, shared_data):
    with tarfile.open(shared_data / "photos.tar") as archive:
        files = [member for member in archive.getmembers() if member.isfile()][:40]
        bodies = [archive.extractfile(file).read() for file in files]  # type: ignore[union-attr]
    child, there = both(device, side, *bodies)
    assert child.pixels is not None and there.pixels is not None and len(there.pixels) == len(child.pixels)
    assert np.abs(there.pixels.astype(int) - child.pixels).mean() < 0.5


def test_files_that_the_device_refuses_go_to_the_child(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("Error while decoding JPEG images: 2")

    monkeypatch.setattr("pipeline.steps.decode_device.decode_jpeg", refuse)
    child, there = both("cpu", 32, GOOD["jpeg"][0], GOOD["png"][0])
    assert np.array_equal(there.pixels, child.pixels) and verdicts(there) == verdicts(child)


def test_large_pictures_are_decoded_a_few_at_a_time(monkeypatch):
    calls: list[int] = []
    original = decode_device.decode_jpeg

    def counted(files, *args, **options):
        calls.append(len(files))
        return original(files, *args, **options)

    monkeypatch.setattr("pipeline.steps.decode_device.BATCH_PIXELS", 2 * 480 * 320)
    monkeypatch.setattr("pipeline.steps.decode_device.RESIZED_PIXELS", 480 * 320)
    monkeypatch.setattr("pipeline.steps.decode_device.decode_jpeg", counted)
    child, there = both("cpu", 32, *[turned(1)] * 5)
    assert calls == [2, 2, 1] and verdicts(there) == verdicts(child) and len(there.pixels) == 5


def on_device(**changes) -> dict:
    preparation = QUICK["preparation"] | {"jpeg": "device", "decode": {"num_gpus": 0.1}}
    return QUICK | {"preparation": preparation} | changes


def test_a_plan_that_decodes_elsewhere_is_another_plan_and_wants_a_gpu():
    plan = parse_plan(on_device(), "test")
    assert plan.version != parse_plan(QUICK, "test").version and plan.asks_for_gpus
    with pytest.raises(
        UsageError, match=r"preparation.jpeg is device, but decoders have no GPU: give preparation.decode num_gpus"
    ):
        parse_plan(QUICK | {"preparation": {"jpeg": "device"}}, "test")
    with pytest.raises(UsageError, match="only the child hashes pictures for banks"):
        parse_plan(on_device(banks=[{"name": "b", "file": "b.csv", "category": "automobile"}]), "test")


def test_fused_actors_have_no_gpus():
    for changes in ({"fused": {"num_gpus": 0.25}}, on_device(fused={"num_cpus": 1})):
        with pytest.raises(UsageError, match="leave out fused"):
            parse_plan(QUICK | changes, "test")
