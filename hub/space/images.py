"""Reading the pictures that strangers upload: within limits, with a sentence for everything that cannot be shown."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["MAX_BYTES", "BadImageError", "read_image"]

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
MOST_PIXELS = f"At most {MAX_PIXELS // 10**6} million are accepted."
MIN_SIDE = 8
MAX_SIDES = 10  # longest side to shortest: networks scale the shortest, and the longest with it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadImageError(ValueError):
    """A picture cannot be shown; the message says why, to whom uploaded it."""


def read_image(file: Path | bytes) -> tuple[Image.Image, str]:
    """Read a picture as RGB with 8 bits, turned as its camera was.

    Args:
        file: The picture, as a file or its content.

    Returns:
        The picture, and a sentence if it was changed to be shown, else "".

    Raises:
        BadImageError: If it is no picture, damaged, too small, too large or too long.
    """
    content = file.read_bytes() if isinstance(file, Path) else file
    if len(content) > MAX_BYTES:
        raise BadImageError(
            f"This file has {len(content) / 2**20:.0f} MB. At most {MAX_BYTES // 2**20} MB are accepted."
        )
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(f"This picture has too many pixels. {MOST_PIXELS}") from error
    except Exception as error:  # Pillow's readers raise what they like at hostile files
        raise BadImageError(f"This file is not a picture. Accepted: {', '.join(FORMATS)}.") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"This picture has {width}×{height} pixels. {MOST_PIXELS}")
    if min(width, height) < MIN_SIDE:
        raise BadImageError(f"This picture has {width}×{height} pixels. Each side must have at least {MIN_SIDE}.")
    if max(width, height) > MAX_SIDES * min(width, height):
        raise BadImageError(
            f"This picture has {width}×{height} pixels. The long side may have at most {MAX_SIDES} times the short one."
        )
    try:
        is_animated = getattr(image, "n_frames", 1) > 1
        image.seek(0)
        image.load()
        upright = ImageOps.exif_transpose(image)
        rgb, note = _to_rgb(upright)
    except BadImageError:
        raise
    except Exception as error:
        raise BadImageError("This picture is damaged: it cannot be read to its end.") from error
    if is_animated:
        note = f"This picture has several frames. The first one is shown. {note}".strip()
    return rgb, note


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise BadImageError("This picture has values that are not finite.")
        low, high = (0, 65535) if image.mode.startswith("I;16") else (values.min(), values.max())
        grey = (values - low) * (255 / max(high - low, 1e-12))
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB"), "Its grey values were reduced to 8 bits."
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB"), (
            "Transparent parts are shown on white."
        )
    if image.mode in ("CMYK", "LAB", "YCbCr", "HSV"):
        return image.convert("RGB"), f"Its colours were converted from {image.mode} to RGB."
    return image.convert("RGB"), ""
