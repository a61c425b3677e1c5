"""Images: opening them, how many soft tokens one takes, and their patches."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gemtune.errors import DataError


@dataclass
class EncodedImage:
    """One image as patches.

    `pixels` is [P, 3 * patch_size**2] float32 in [0, 1] and `positions` [P, 2] int64 (x, y),
    without padding; P is the soft-token count times pooling**2.
    """

    pixels: np.ndarray
    positions: np.ndarray


class ImageEncoder:
    """Turns images into patches as the checkpoint's own image processor does.

    Args:
        processor: a `Gemma4ImageProcessorPil`.
        media_root: folder that relative paths start from.
    """

    def __init__(self, processor: Any, media_root: Path | None = None) -> None:
        self.processor = processor
        self.media_root = media_root
        self._grid = processor.patch_size * processor.pooling_kernel_size
        self._max_patches = processor.max_soft_tokens * processor.pooling_kernel_size**2

    def open(self, image: Any, where: str) -> Image.Image:
        """Open bytes, a path or a PIL image; the pixels are read only when they are used.

        Raises:
            DataError: missing, or not an image; the message begins with `where`.
        """
        if isinstance(image, dict):
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if isinstance(image, Image.Image):
            return image
        try:
            if isinstance(image, bytes):
                return Image.open(io.BytesIO(image))
            if isinstance(image, str):
                return Image.open(self._path(image, where))
        except FileNotFoundError as error:
            raise DataError(f"{where}: there is no image file {error.filename}.") from error
        except (UnidentifiedImageError, IsADirectoryError, Image.DecompressionBombError) as error:
            raise DataError(f"{where}: not an image that can be read ({error}).") from error
        raise DataError(
            f"{where}: an image must be bytes, a file path or a PIL image, not "
            f"{type(image).__name__}."
        )

    def num_soft_tokens(self, image: Image.Image, where: str) -> int:
        """How many placeholder tokens the image takes, from its size alone."""
        width, height = self._fit(*_upright_size(image), where)
        return (width // self._grid) * (height // self._grid)

    def encode(self, image: Image.Image, where: str) -> EncodedImage:
        """Patches and their positions. Raises DataError if the pixels cannot be decoded."""
        try:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{where}: the image is damaged ({error}).") from error
        # A processor that does not resize (the tiny model's) still takes images of any size:
        # those already on its patch grid go in untouched, the rest are resized as usual.
        on_grid = self._on_grid(*upright.size)
        features = self.processor(
            upright,
            do_resize=self.processor.do_resize or not on_grid,
            return_tensors="np",
        )
        num_patches = int(features["num_soft_tokens_per_image"][0]) * (
            self.processor.pooling_kernel_size**2
        )
        return EncodedImage(
            np.asarray(features["pixel_values"][0][:num_patches], dtype=np.float32),
            np.asarray(features["image_position_ids"][0][:num_patches], dtype=np.int64),
        )

    def _on_grid(self, width: int, height: int) -> bool:
        patches = (width // self.processor.patch_size) * (height // self.processor.patch_size)
        return not width % self._grid and not height % self._grid and patches <= self._max_patches

    def _fit(self, width: int, height: int, where: str) -> tuple[int, int]:
        """The size that the processor resizes to: as large as the patch budget allows, aspect
        kept, sides rounded down to the grid."""
        if not self.processor.do_resize and self._on_grid(width, height):
            return width, height
        budget = self._max_patches * self.processor.patch_size**2
        factor = math.sqrt(budget / (width * height))
        fitted_width = math.floor(factor * width / self._grid) * self._grid
        fitted_height = math.floor(factor * height / self._grid) * self._grid
        longest = (self._max_patches // self.processor.pooling_kernel_size**2) * self._grid
        if fitted_width == 0 and fitted_height == 0:
            raise DataError(f"{where}: an image of {width}x{height} pixels is too thin to encode.")
        if fitted_height == 0:
            return min(math.floor(width / height) * self._grid, longest), self._grid
        if fitted_width == 0:
            return self._grid, min(math.floor(height / width) * self._grid, longest)
        return fitted_width, fitted_height

    def _path(self, path: str, where: str) -> Path:
        if "://" in path:
            raise DataError(f"{where}: images are not fetched from URLs ({path}). Save it first.")
        candidate = Path(path).expanduser()
        if not candidate.is_absolute() and self.media_root is not None:
            candidate = self.media_root / candidate
        return candidate


def _upright_size(image: Image.Image) -> tuple[int, int]:
    orientation = image.getexif().get(0x0112, 1)
    width, height = image.size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)
