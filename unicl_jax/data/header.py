"""What the first bytes of an image file promise, before anything is decoded.

A file of a few kilobytes can ask for gigabytes of pixels: such a one is refused from
its header.
"""

import struct

from unicl_jax.config import MAX_PIXELS

CANNOT_DECODE = "image cannot be decoded"
TOO_LARGE = "image has more than max_pixels"

# JPEG markers: those of a frame's header but for DHT, JPG and DAC; those of no length.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset(range(0xD0, 0xD9)) | {0x00, 0x01}
_END, _SCAN = 0xD9, 0xDA


def refusal(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    """Says why an image must not be decoded.

    Args:
      data: the file's bytes.
      max_pixels: width times height.

    Returns:
      A reason for `skipped`; "" if nothing speaks against it that the header says.
    """
    size = image_size(data)
    return TOO_LARGE if size is not None and size[0] * size[1] > max_pixels else ""


def image_size(data: bytes) -> tuple[int, int] | None:
    """Reads the sides of an image from its header.

    Args:
      data: the file's bytes.

    Returns:
      (width, height); None if they are not found, where it is the decoder's to say why.
    """
    if data[:2] == b"\xff\xd8":  # libjpeg passes over what stands before a marker
        return _jpeg(data)
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            return struct.unpack_from(">II", data, 16)
        if data[:4] == b"GIF8":
            return _gif(data)
        if data[:2] == b"BM":
            is_old = struct.unpack_from("<I", data, 14)[0] == 12  # OS/2's
            width, height = struct.unpack_from("<HH" if is_old else "<ii", data, 18)
            return abs(width), abs(height)  # below 0: from the top down
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except struct.error:
        pass  # cut off
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """The sides in the frame's header, which stands behind segments of any length."""
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 9 > len(data):
            return None
        kind = data[at + 1]
        if kind in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        if kind in (_END, _SCAN):
            return None
        if kind == 0xFF:  # a byte that fills up
            at += 1
        elif kind in _BARE:
            at += 2
        else:
            at += 2 + max(2, struct.unpack_from(">H", data, at + 2)[0])


def _gif(data: bytes) -> tuple[int, int]:
    """The sides of the screen, which the first frame may go beyond."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, end = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0), len(data)
    while at < end and data[at] == 0x21:  # an extension, in blocks
        at += 2
        while at < end and data[at]:
            at += data[at] + 1
        at += 1
    if at < end and data[at] == 0x2C:
        left, top, *sides = struct.unpack_from("<HHHH", data, at + 1)
        width, height = max(width, left + sides[0]), max(height, top + sides[1])
    return width, height


def _webp(data: bytes) -> tuple[int, int] | None:
    """The sides of a lossy or lossless image, or of the canvas."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return tuple(int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27))
    if kind == b"VP8 ":
        return tuple(side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None
