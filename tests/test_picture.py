"""Decoding: what good formats look like, what bad files are called, and what a hostile one costs."""

from __future__ import annotations

import io
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from pipeline.plan import Preparation
from pipeline.steps import decode
from pipeline.steps.decode import Decoder
from pipeline.steps.picture import PictureError, decode_picture
from pipeline.window import Image, Window


def scene(mode: str = "RGB", size: tuple[int, int] = (120, 80)) -> Pillow.Image:
    """Left half red, right half blue, a green stripe at the top."""
    picture = Pillow.new("RGB", size, (200, 30, 30))
    picture.paste((30, 30, 200), (size[0] // 2, 0, *size))
    picture.paste((30, 200, 30), (0, 0, size[0], size[1] // 8))
    return picture.convert(mode)


def save(picture: Pillow.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


GOOD = {
    "jpeg": (save(scene(), "JPEG", quality=95), "JPEG"),
    "cmyk jpeg": (save(scene("CMYK"), "JPEG", quality=95), "JPEG"),
    "progressive jpeg": (save(scene(), "JPEG", quality=95, progressive=True), "JPEG"),
    "png": (save(scene(), "PNG"), "PNG"),
    "palette png": (save(scene().convert("P", palette=Pillow.Palette.ADAPTIVE), "PNG"), "PNG"),
    "webp": (save(scene(), "WEBP", quality=95), "WEBP"),
    "animated gif": (save(scene(), "GIF", save_all=True, append_images=[Pillow.new("RGB", (120, 80))]), "GIF"),
    "animated webp": (
        save(scene(), "WEBP", lossless=True, save_all=True, append_images=[Pillow.new("RGB", (120, 80))]),
        "WEBP",
    ),
    "bmp": (save(scene(), "BMP"), "BMP"),
    "tiff": (save(scene(), "TIFF"), "TIFF"),
    "avif": (save(scene(), "AVIF", quality=95), "AVIF"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_formats_show_the_first_frame_whole(name):
    body, kind = GOOD[name]
    picture = decode_picture(body, 32)
    assert (picture.format, picture.width, picture.height) == (kind, 120, 80)
    assert picture.pixels.shape == (32, 32, 3) and picture.pixels.dtype == np.uint8
    red, blue, green = picture.pixels[20, 5], picture.pixels[20, 27], picture.pixels[1, 16]
    assert red[0] > 140 > red[2] + 40 and blue[2] > 140 > blue[0] + 40 and green[1] > 120


def test_exif_rotation_is_applied():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    turned = decode_picture(save(scene(), "JPEG", quality=95, exif=exif), 32)
    assert (turned.width, turned.height) == (120, 80)
    expected = np.rot90(decode_picture(GOOD["jpeg"][0], 32).pixels, -1)
    assert np.abs(turned.pixels.astype(int) - expected).mean() < 3


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
    picture = decode_picture(save(Pillow.fromarray(ramp), "PNG"), 64)
    assert picture.pixels[:, 32].mean() == pytest.approx(130, abs=6)


def test_transparency_is_shown_on_white():
    picture = scene("RGBA")
    picture.putalpha(0)
    assert decode_picture(save(picture, "PNG"), 16).pixels.min() == 255


def full_decode(body: bytes, side: int) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(body)).convert("RGB").resize((side, side), Pillow.Resampling.BILINEAR))


@pytest.mark.parametrize(("size", "grain"), [((1600, 1200), 40), ((501, 375), 50), ((331, 1999), 50)])
@pytest.mark.parametrize("side", [80, 112, 160])
def test_draft_decoding_is_within_half_a_grey_level_of_a_full_one(size, grain, side):
    """Of odd sizes too, where a half of the picture is a little more than the half of its pixels."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (max(2, size[1] // grain), max(2, size[0] // grain), 3), dtype=np.uint8)
    body = save(Pillow.fromarray(noise).resize(size, Pillow.Resampling.BICUBIC), "JPEG", quality=90)
    assert np.abs(decode_picture(body, side).pixels.astype(int) - full_decode(body, side)).mean() < 0.5


@pytest.mark.parametrize("side", [80, 112, 160, 224])
def test_drafts_of_photographs_are_within_half_a_grey_level(shared_data, side):
    with tarfile.open(shared_data / "photos.tar") as tar:
        bodies = [tar.extractfile(member).read() for member in tar.getmembers() if member.isfile()][:100]
    differences = [
        np.abs(decode_picture(body, side).pixels.astype(int) - full_decode(body, side)).mean() for body in bodies
    ]
    assert len(differences) == 100 and np.mean(differences) < 0.5


BAD = {
    "empty": (b"", "empty"),
    "text": (b"this is no picture\n" * 10, "not_an_image"),
    "a truncated jpeg": (GOOD["jpeg"][0][:600], "truncated"),
    "a truncated png": (save(Pillow.effect_noise((90, 90), 90), "PNG")[:3000], "truncated"),
    "a header of 60,000 x 60,000": (png_header(60_000, 60_000), "too_many_pixels"),
    "a png without its pixels": (png_header(50, 50), "truncated"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_errors_with_a_code_that_says_which(name):
    body, code = BAD[name]
    with pytest.raises(PictureError) as caught:
        decode_picture(body, 32)
    assert caught.value.code == code
    assert "\n" not in caught.value.detail and caught.value.detail


def window(*payloads: bytes) -> Window:
    images = [Image(image_id=str(i), uri=f"file:///{i}", payload=body) for i, body in enumerate(payloads)]
    return Window(shard=0, window=0, first_ordinal=0, images=images)


def test_the_decoder_keeps_order_and_leaves_errors_out():
    decoder = Decoder("decode:s", 32, Preparation())
    (result,) = decoder([window(GOOD["jpeg"][0], b"", GOOD["png"][0], BAD["text"][0])])
    assert [image.outcome for image in result.images] == [None, "error", None, "error"]
    assert [image.error_code for image in result.images] == [None, "empty", None, "not_an_image"]
    assert np.array_equal(result.pixels[1], decode_picture(GOOD["png"][0], 32).pixels)
    assert result.images[0].format == "JPEG" and result.images[1].payload is None
    assert (result.work[0].images_in, result.work[0].images_out) == (4, 2)


def test_a_window_without_a_good_picture_has_no_pixels():
    (result,) = Decoder("decode:s", 32, Preparation())([window(b"", b"x")])
    assert result.pixels is None and result.undecided == []


def test_a_decoder_that_hangs_costs_one_error_row(monkeypatch):
    decoder = Decoder("decode:s", 32, Preparation(decode_seconds=0.7))
    decoder([window(GOOD["jpeg"][0])])
    first = decoder.child.process.pid
    os.kill(first, signal.SIGSTOP)
    (result,) = decoder([window(GOOD["jpeg"][0], GOOD["png"][0])])
    assert [image.error_code for image in result.images] == ["decode_timeout", None]
    assert decoder.child.process.pid != first


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no such policy")
def test_who_waits_for_a_child_does_not_interrupt_it(monkeypatch):
    seen: list[int] = []
    decoder = decode.Decoder("decode", 32, Preparation())
    monkeypatch.setattr(decoder, "_decode", lambda images: seen.append(os.sched_getscheduler(0)) or (None, {}))
    decoder([window()])
    assert seen == [os.SCHED_BATCH] and os.sched_getscheduler(0) == os.SCHED_OTHER

    def forbidden(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    decoder([window()])
    assert seen[1:] == [os.SCHED_OTHER], "and it decodes all the same"


class Rigged(decode._Child):
    """A child that breaks on the payload POISON, as ``breaks`` says."""

    breaks = staticmethod(lambda child: child.process.kill())

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sent: list[bytes] = []

    def send(self, payload: bytes) -> None:
        self.wait_until_ready()
        self.sent.append(payload)
        if POISON not in self.sent:
            super().send(payload)  # what comes behind the poison is never reached

    def receive(self, seconds: float) -> tuple[list, np.ndarray | None]:
        if self.sent.pop(0) == POISON:
            self.breaks(self)
        return super().receive(seconds)


POISON = b"poison"


def test_a_file_that_kills_its_decoders_costs_one_error_row(monkeypatch):
    monkeypatch.setattr(decode, "_Child", Rigged)
    decoder = Decoder("decode:s", 32, Preparation())
    (result,) = decoder([window(GOOD["jpeg"][0], POISON, GOOD["png"][0])])
    assert [image.error_code for image in result.images] == [None, "decode_crash", None]
    assert result.images[1].error_detail == "2 decoders died on it, the last with status -9"


def test_a_decoder_that_somebody_kills_costs_nothing():
    decoder = Decoder("decode:s", 32, Preparation())
    decoder([window(GOOD["jpeg"][0])])
    decoder.child.process.kill()
    (result,) = decoder([window(GOOD["jpeg"][0], GOOD["png"][0])])
    assert [image.error_code for image in result.images] == [None, None]


def test_decoders_are_recycled(monkeypatch):
    monkeypatch.setattr(decode, "RECYCLED_AFTER", 3)
    decoder = Decoder("decode:s", 32, Preparation())
    pids = []
    for _ in range(7):
        decoder([window(GOOD["jpeg"][0])])
        pids.append(decoder.child.process.pid)
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]


def test_a_picture_that_wants_more_memory_than_allowed_is_an_error():
    body = save(Pillow.new("RGB", (9000, 9000)), "PNG")  # 243 MB of pixels
    (result,) = Decoder("decode:s", 32, Preparation(decode_gigabytes=0.1))([window(body, GOOD["png"][0])])
    assert [image.error_code for image in result.images] == ["decode_memory", None]


def test_the_child_dies_with_its_parent():
    code = (
        "import time; from tests.test_picture import GOOD, window; from pipeline.steps.decode import Decoder\n"
        "from pipeline.plan import Preparation\n"
        "decoder = Decoder('d', 32, Preparation()); decoder([window(GOOD['png'][0])])\n"
        "print(decoder.child.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, signal.SIGSTOP)  # it cannot notice by itself that its socket has closed
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"decoder {child} outlived its parent")


def test_windows_of_files_that_hang_do_not_take_for_ever(monkeypatch):
    monkeypatch.setattr(Rigged, "breaks", staticmethod(lambda child: os.kill(child.process.pid, signal.SIGSTOP)))
    monkeypatch.setattr(decode, "_Child", Rigged)
    monkeypatch.setattr(decode, "PATIENCE", 2)
    monkeypatch.setattr(decode, "HANGING_SECONDS", 4.0)
    decoder = Decoder("decode:s", 32, Preparation(decode_seconds=1.5))
    began = time.monotonic()
    bodies = [POISON] * 6 + [GOOD["png"][0]]
    first, second = decoder([window(GOOD["png"][0], *bodies), window(*bodies)])
    # Two for a second and a half, one or two for one; then none is tried, and neither is the good one after them.
    details = [image.error_detail for image in [*first.images, *second.images]]
    assert details[:4] == [None, *["not decoded within 1.5 s"] * 2, "not decoded within 1 s"]
    assert all("not tried: other files have hung for" in detail for detail in details[5:])
    assert {image.error_code for image in first.images[1:]} == {"decode_timeout"}
    assert time.monotonic() - began < 5 + 5
    (later,) = decoder([window(GOOD["png"][0])])
    assert later.images[0].outcome is None, "the next call begins anew"


@pytest.mark.parametrize(
    "answer",
    [
        b"no json",
        b"{}",
        b'["JPEG", "a", "b"]',
        b'["new code", "x"]',
        b"[" + b"1," * 40_000 + b"1]",
        b"[" * 60_000,
        b'["JPEG", 3000000000, 1]',
        b'["JPEG", -1, 1]',
        b'["JPEG", true, 1]',
    ],
)
def test_a_child_that_answers_nonsense_costs_one_error_row(monkeypatch, answer):
    def talk(child: decode._Child) -> None:
        ours, theirs = socket.socketpair()
        child.connection = Connection(ours.detach())
        Connection(theirs.detach()).send_bytes(answer)

    monkeypatch.setattr(Rigged, "breaks", staticmethod(talk))
    monkeypatch.setattr(decode, "_Child", Rigged)
    decoder = Decoder("decode:s", 32, Preparation())
    (result,) = decoder([window(POISON, GOOD["png"][0])])
    assert [image.error_code for image in result.images] == ["decode_crash", None]
