"""From encoded bytes to pixels: whole images, or JPEGs at half their size and less.

Decodable: JPEG (grey, RGB, CMYK), PNG, GIF and WebP (their first frames), BMP.
Transparent pixels are laid on white, 16 bits are cut to 8; EXIF rotation is not
applied. Letters in shapes: H and W pixels of the stored image.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image

_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow opens what runs programs, too
_COLORS = ("Gray", "YCbCr", "RGB")  # of JPEGs; CMYK goes through Pillow
# What libjpeg warns of where nothing of the picture is lost: its header is odd, or
# there is more than a picture. Common in images of the web.
_ODDITIES = (
    "extraneous bytes before marker",
    "Invalid SOS parameters",
    "unknown JFIF revision",
    "Unknown Adobe color transform",
    "Inconsistent progression sequence",
)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG says it has; None if Pillow is to decode it.

    Args:
      data: the file's bytes.

    Returns:
      (H, W), or None.
    """
    if not simplejpeg.is_jpeg(data):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # no header, or one that it has no name for
        return None
    return (height, width) if color in _COLORS else None


def decode(data: bytes, least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Decodes an image to RGB.

    Args:
      data: the file's bytes.
      least: (H, W) that will do: a JPEG of at least twice both is decoded at the
        smallest of 1/2, 3/8, 1/4 and 1/8 of its size that is as large, a smaller one
        whole, and either with less care for its chroma; 0: the whole, exactly.

    Returns:
      [H, W, 3] uint8, or a JPEG's scaled sides.

    Raises:
      ValueError: if the bytes are cut off or no known format.
    """
    if jpeg_size(data) is not None:
        height, width = least
        # Chroma is repeated there, not interpolated: a seventh less time.
        scaled = dict(min_height=height, min_width=width, min_factor=2)
        scaled["fastupsample"] = True
        try:
            return simplejpeg.decode_jpeg(data, **scaled if any(least) else {})
        except ValueError as error:
            if not any(oddity in str(error) for oddity in _ODDITIES):
                raise
            # It is whole, or Pillow says that it is not.
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            return np.asarray(_rgb(image))
    except ValueError:
        raise
    # Pillow's decoders raise what they like: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(f"not an image: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """The first frame in RGB, on white where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits; the frame itself is what decides
        values = np.asarray(image)
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")
