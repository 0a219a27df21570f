"""JPEG decoded on the GPU, for sources that are trusted: what is there cannot be killed.

torchvision hands baseline files to the chip's own JPEG units where it has some (A100, H100 and later), and decodes the
others on its cores. Everything that is unusual in a file, and every file that is no JPEG, is left to the guarded
decoder, so that errors and their codes are the same.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.plan import Preparation
from pipeline.steps.decode import Decoder
from pipeline.steps.device import accelerator, open_device
from pipeline.steps.picture import BROKEN_FILE, ORIENTATION_TAG, upright
from pipeline.window import Image

# The limit is the plan's, and what is over it is for the child to refuse.
PillowImage.MAX_IMAGE_PIXELS = None

BEGINS, ENDS = b"\xff\xd8\xff", b"\xff\xd9"
BATCH_PIXELS = 256_000_000
"""Of the pictures that are decoded together: three bytes each on the device, and twelve of one size while resized."""
RESIZED_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class _Header:
    width: int
    height: int
    orientation: int

    @property
    def pixels(self) -> int:
        return self.width * self.height


class DeviceDecoder(Decoder):
    """``windows -> windows``, like ``Decoder``, whose child gets what the device does not.

    A file that the device refuses takes its whole batch to the child.
    """

    def __init__(self, operator: str, side: int, limits: Preparation, gpu_kind: str | None = None) -> None:
        """Raises RunError when there is no such device."""
        super().__init__(operator, side, limits)
        self.device = open_device(gpu_kind or accelerator(), f"{operator!r}")

    def _decode(self, images: list[Image]) -> tuple[np.ndarray | None, dict[int, tuple[str, int]]]:
        done: dict[int, np.ndarray] = {}
        for batch in self._batches(images):
            done |= self._decode_there(batch)
        left = [image for image in images if id(image) not in done]
        pixels, hashes = super()._decode(left) if left else (None, {})
        if pixels is not None:
            done |= zip((id(image) for image in left if image.outcome is None), pixels, strict=True)
        rows = [done[id(image)] for image in images if id(image) in done]
        return np.stack(rows) if rows else None, hashes

    def _batches(self, images: list[Image]) -> Iterator[list[tuple[Image, _Header]]]:
        batch: list[tuple[Image, _Header]] = []
        pixels = 0
        for image in images:
            header = self._header(image.payload or b"")
            if header is None:
                continue
            if batch and pixels + header.pixels > BATCH_PIXELS:
                yield batch
                batch, pixels = [], 0
            batch.append((image, header))
            pixels += header.pixels
        if batch:
            yield batch

    def _header(self, payload: bytes) -> _Header | None:
        """None for what the child should have: other formats, other colours, files that do not end as they should."""
        if not payload.startswith(BEGINS) or not payload.endswith(ENDS):
            return None
        try:
            with PillowImage.open(io.BytesIO(payload), formats=("JPEG",)) as picture:
                header = _Header(*picture.size, picture.getexif().get(ORIENTATION_TAG, 1))
                # Adobe's marker says when three components are no luma and chroma; files of several pictures are MPO.
                ordinary = picture.mode == "RGB" and picture.info.get("adobe_transform", 1) == 1
                ordinary = ordinary and picture.format == "JPEG"
        except BROKEN_FILE:
            return None
        return header if ordinary and header.pixels <= self.limits.max_megapixels * 1_000_000 else None

    @torch.inference_mode()
    def _decode_there(self, batch: list[tuple[Image, _Header]]) -> dict[int, np.ndarray]:
        """Pixels (side, side, 3) by id of the image; nothing when one of the files is refused."""
        files = [torch.frombuffer(bytearray(image.payload or b""), dtype=torch.uint8) for image, _ in batch]
        try:
            pictures = decode_jpeg(files, ImageReadMode.RGB, device=self.device)
        except RuntimeError:
            return {}
        pixels_NSS3 = self._resize(pictures).cpu().numpy()
        for (image, header), pixels in zip(batch, pixels_NSS3, strict=True):
            image.format, image.width, image.height = "JPEG", header.width, header.height
            if header.orientation != 1:
                pixels[:] = np.asarray(upright(PillowImage.fromarray(pixels), header.orientation))
        return {id(image): pixels for (image, _), pixels in zip(batch, pixels_NSS3, strict=True)}

    def _resize(self, pictures: list[Tensor]) -> Tensor:
        """uint8 (N, side, side, 3) of pictures (3, H, W): Pillow's bilinear filter, those of one size together."""
        found = torch.empty(len(pictures), self.side, self.side, 3, dtype=torch.uint8, device=self.device)
        for rows in _of_one_size(pictures):
            size = (self.side, self.side)
            whole_NCHW = torch.stack([pictures[row] for row in rows]).float()
            small_NCSS = functional.interpolate(whole_NCHW, size, mode="bilinear", antialias=True, align_corners=False)
            found[rows] = small_NCSS.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        return found


def _of_one_size(pictures: list[Tensor]) -> Iterator[list[int]]:
    """Rows of pictures of one size, as many as are resized at once."""
    rows_of: dict[torch.Size, list[int]] = defaultdict(list)
    for row, picture in enumerate(pictures):
        rows_of[picture.shape].append(row)
    for shape, rows in rows_of.items():
        most = max(1, RESIZED_PIXELS // (shape[1] * shape[2]))
        for start in range(0, len(rows), most):
            yield rows[start : start + most]
