"""Pictures that come as train/<class>/ and test/<class>/, in a folder or a tar.

Thresholds are set on the part of train/ that no net has learnt from, and judged on test/.
"""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.errors import UsageError
from pipeline.labels.examples import LabelledPictures, split_off
from pipeline.steps.picture import PictureError, decode_picture

HELD_OUT_SHARE = 0.1
"""Of train/, as when the nets were trained: they have not learnt from these."""


@dataclass(frozen=True, kw_only=True)
class LabelledPixels:
    """``pixels_NSS3`` uint8; ``positive_N`` bool: which show the rare class."""

    pixels_NSS3: np.ndarray
    positive_N: np.ndarray


def read_splits(data: Path, category: str, side: int) -> tuple[LabelledPixels, LabelledPixels]:
    """The held-out part of train/, and test/, at ``side`` pixels. Raises UsageError."""
    parts: dict[str, dict[str, bytes]] = {"train": {}, "test": {}}
    for name, payload in _read_files(data):
        path = PurePosixPath(name)
        if len(path.parts) >= 3 and path.parts[-3] in parts:
            parts[path.parts[-3]]["/".join(path.parts[-3:])] = payload
    labelled = {}
    for part, payloads in parts.items():
        positive_N = np.array([name.split("/")[1] == category for name in payloads], dtype=bool)
        if not positive_N.any() or positive_N.all():
            found = ", ".join(sorted({name.split("/")[1] for name in payloads})) or "nothing"
            raise UsageError(
                f"--data {data}: wanted {part}/{category}/ with pictures and other classes beside it; "
                f"in {part}/ is {found}"
            )
        labelled[part] = LabelledPictures(uris=list(payloads), labels_NK=positive_N[:, None])
    _, held = split_off(labelled["train"], HELD_OUT_SHARE)
    if not held.labels_NK.any() or held.labels_NK.all():
        raise UsageError(
            f"--data {data}: of the {len(held.uris)} pictures held out of train/ "
            f"{int(held.labels_NK.sum())} show {category}; give more pictures of each kind"
        )
    return _decode(held, parts["train"], side), _decode(labelled["test"], parts["test"], side)


def _read_files(data: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files of a folder or a tar, which is read in one pass and never extracted."""
    try:
        if data.is_dir():
            for path in sorted(data.glob("*/*/*")):
                if path.is_file():
                    yield path.relative_to(data).as_posix(), path.read_bytes()
            return
        with tarfile.open(data, "r|*") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield member.name, content.read()
    except OSError as error:
        raise UsageError(f"--data {data}: {error.strerror or error}") from error
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"--data {data} is neither a folder nor a whole tar: {error}") from error


def _decode(pictures: LabelledPictures, payloads: dict[str, bytes], side: int) -> LabelledPixels:
    pixels = np.empty((len(pictures.uris), side, side, 3), np.uint8)
    for row, name in enumerate(pictures.uris):
        try:
            pixels[row] = decode_picture(payloads[name], side).pixels
        except PictureError as error:
            raise UsageError(f"{name}: {error.code}: {error.detail}; remove it from the data") from error
    return LabelledPixels(pixels_NSS3=pixels, positive_N=pictures.labels_NK[:, 0])
