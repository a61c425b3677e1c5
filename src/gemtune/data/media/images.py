"""Images: opening them, how many soft tokens one takes, and their patches."""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from gemtune.data.media.files import MediaPolicy, bytes_or_path, open_medium
from gemtune.errors import DataError

# What data may be decoded by. Pillow knows more, and among them some that run programs (EPS), hold
# images inside of images (ICO, ICNS) or are no pictures of the world.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


@dataclass
class EncodedImage:
    """One image as patches, without padding.

    `pixels` is [P, 3 * patch_size**2] float32 in [0, 1] and `positions` [P, 2] int64 (x, y);
    P is the soft-token count times pooling**2.
    """

    pixels: np.ndarray
    positions: np.ndarray
    num_soft_tokens: int


class ImageEncoder:
    """Turns images into patches as the checkpoint's own image processor does.

    EXIF orientation is applied first, and what is transparent becomes white. Of an animation the
    first frame is taken. Values of 16 bits keep their high byte.

    Args:
        processor: a `Gemma4ImageProcessorPil`.
        media_root: the folder that paths start from and may not leave; None: no path is read.
        policy: what may be read.
    """

    def __init__(
        self,
        processor: Any,
        media_root: Path | None = None,
        policy: MediaPolicy | None = None,
    ) -> None:
        self.processor = processor
        self.media_root = media_root
        self.policy = policy or MediaPolicy()
        self._grid = processor.patch_size * processor.pooling_kernel_size
        self._max_patches = processor.max_soft_tokens * processor.pooling_kernel_size**2

    def open(self, image: Any, where: str, media_root: Path | None = None) -> Image.Image:
        """Open bytes, a path or a PIL image; the pixels are read only when they are used.

        `media_root` stands in for that of the encoder where it is given.

        Raises:
            DataError: missing, not allowed, too large, or not an image; the message begins with
                `where`.
        """
        if isinstance(image, Image.Image):
            return image
        given = bytes_or_path(image, "image", where)
        root = media_root if media_root is not None else self.media_root
        file = open_medium(given, "image", where, root, self.policy)
        try:
            opened = self._header(file, where)
        except DataError:
            file.close()
            raise
        width, height = opened.size
        if width * height > self.policy.max_image_pixels:
            file.close()
            raise DataError(
                f"{where}: the image is too large: {width} x {height} are {width * height:,} "
                f"pixels, and data.max_image_pixels={self.policy.max_image_pixels:,} are allowed. "
                "Make it smaller, or raise the limit."
            )
        if self.policy.verify_media:
            load(opened, where)
        return opened

    def _header(self, file: BinaryIO, where: str) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return Image.open(file, formats=_formats())
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"{where}: the image is too large. Make it smaller. ({error})"
            ) from error
        except Image.UnidentifiedImageError as error:
            raise DataError(
                f"{where}: not an image that can be read. The formats are {', '.join(FORMATS)}."
            ) from error
        except Exception as error:  # plugins raise whatever their parsers meet
            raise DataError(
                f"{where}: not an image that can be read ({error or type(error).__name__})."
            ) from error

    def num_soft_tokens(self, image: Image.Image) -> int:
        """How many placeholder tokens the image takes, from its size alone.

        Its orientation is not asked for: both sides are treated alike, so that turning an image
        does not change the count, and for a PNG every pixel would be decoded to find it.
        """
        return self.num_soft_tokens_of(*image.size)

    def num_soft_tokens_of(self, width: int, height: int) -> int:
        """The same of a size."""
        width, height = self._fit(width, height)
        return (width // self._grid) * (height // self._grid)

    def encode(self, image: Image.Image, where: str) -> EncodedImage:
        """Patches and their positions. Raises DataError if the pixels cannot be decoded."""
        upright = _to_rgb(_upright(image, where), where)
        # A processor that does not resize (the tiny model's) still takes images of any size:
        # those already on its patch grid go in untouched, the rest are resized as usual.
        features = self.processor(
            upright,
            do_resize=self.processor.do_resize or not self._on_grid(*upright.size),
            return_tensors="np",
        )
        num_soft_tokens = int(features["num_soft_tokens_per_image"][0])
        num_patches = num_soft_tokens * self.processor.pooling_kernel_size**2
        return EncodedImage(
            np.asarray(features["pixel_values"][0][:num_patches], dtype=np.float32),
            np.asarray(features["image_position_ids"][0][:num_patches], dtype=np.int64),
            num_soft_tokens,
        )

    def _on_grid(self, width: int, height: int) -> bool:
        patches = (width // self.processor.patch_size) * (height // self.processor.patch_size)
        return not width % self._grid and not height % self._grid and patches <= self._max_patches

    def _fit(self, width: int, height: int) -> tuple[int, int]:
        """The size that the processor resizes to: as large as the patch budget allows, aspect
        kept, sides rounded down to the grid."""
        if not self.processor.do_resize and self._on_grid(width, height):
            return width, height
        budget = self._max_patches * self.processor.patch_size**2
        factor = math.sqrt(budget / (width * height))
        fitted_width = math.floor(factor * width / self._grid) * self._grid
        fitted_height = math.floor(factor * height / self._grid) * self._grid
        # The budget is many squares of the grid, so that only one side can round down to nothing.
        longest = self.processor.max_soft_tokens * self._grid
        if fitted_height == 0:
            return min(math.floor(width / height) * self._grid, longest), self._grid
        if fitted_width == 0:
            return self._grid, min(math.floor(height / width) * self._grid, longest)
        return fitted_width, fitted_height


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image, where: str) -> Image.Image:
    """Decoded, with its EXIF orientation applied."""
    load(image, where)
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF says nothing of how the image lies
        return image


def load(image: Image.Image, where: str) -> None:
    """Decode it. Raises DataError if it is damaged."""
    num_pixels = math.prod(image.size)
    try:
        image.load()
    except Exception as error:  # decoders of a dozen formats: OSError, SyntaxError, struct.error...
        raise DataError(f"{where}: the image is damaged ({error}).") from error
    if math.prod(image.size) != num_pixels:  # what was counted and capped is the header's
        raise DataError(f"{where}: the image is damaged (it is not of the size that it says).")


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would cut every value above 255 to white.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() <= 0xFFFF:
            return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(
            f"{where}: the image has 32-bit values (mode {image.mode}), of which white is unknown. "
            "Save it with 8 bits a channel."
        )
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        # As transformers does in its later releases; convert("RGB") alone shows hidden colours.
        visible = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, visible).convert("RGB")
    except ValueError as error:
        raise DataError(f"{where}: the image cannot become RGB ({error}).") from error
