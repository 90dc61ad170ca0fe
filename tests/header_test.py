"""The sides that a header says, against Pillow; what is too large is never decoded."""

import io
import struct
import tracemalloc
import zlib

import pytest
from real_files import Image, encoded, photo

from unicl_jax.config import MAX_PIXELS
from unicl_jax.data.header import TOO_LARGE, image_size, refusal
from unicl_jax.data.raw import make_filter
from unicl_jax.data.readers import Unreadable

SIDE = 50_000


def png_header(width, height):
    """A PNG that says so and holds no pixel."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk


def promising(kind, side=SIDE):
    """The bytes of an image whose header says that it is `side` x `side`."""
    if kind == "PNG":
        return png_header(side, side)
    image = photo(0)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = bytearray(encoded(image, kind, **lossless))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, -side)
    else:  # a lossless one has 14 bits a side, a canvas 24
        canvas = (side - 1).to_bytes(3, "little") * 2
        chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
        data[4:8] = struct.pack("<I", len(data) - 8 + len(chunk))
        data[12:12] = chunk
    return bytes(data)


KINDS = ["JPEG", "PNG", "GIF", "BMP", "WEBP"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_refused_from_its_header(kind):
    data = promising(kind)
    assert image_size(data) == (SIDE, SIDE)
    tracemalloc.start()
    try:
        assert refusal(data) == TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
    assert refusal(data, SIDE**2) == ""
    assert refusal(promising(kind, 13_377)) == ""  # the largest square allowed
    assert 13_377**2 <= MAX_PIXELS < 13_378**2


PHOTO = photo(1, 91, 67)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *((kind, "RGB", {}) for kind in KINDS),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"icc_profile": b"\xff\xc0" * 40_000, "exif": b"Exif" * 99}),
        *(("PNG", mode, {}) for mode in ("1", "P", "LA", "RGBA", "I;16")),
        ("BMP", "1", {}),
        ("BMP", "P", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"save_all": True, "append_images": [PHOTO.rotate(90)]}),
        ("GIF", "RGB", {"save_all": True, "append_images": [PHOTO.rotate(90)]}),
    ],
)
def test_the_sides_are_those_that_pillow_reads(kind, mode, options):
    image = PHOTO.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = image.convert("I;16")
    data = encoded(image, kind, **options)
    with Image.open(io.BytesIO(data)) as opened:
        assert image_size(data) == opened.size == (91, 67)
    assert refusal(data) == ""
    assert refusal(data, 91 * 67 - 1) == TOO_LARGE
    for end in range(0, len(data), max(1, len(data) // 200)):
        assert image_size(data[:end]) in (None, (91, 67))


def test_libjpeg_passes_over_what_is_before_a_marker():
    data = encoded(Image.new("RGB", (40, 30)), "JPEG")
    assert image_size(data[:2] + b"\x00" + data[2:]) == (40, 30)


def test_a_gifs_first_frame_may_be_larger_than_its_screen():
    data = bytearray(encoded(PHOTO, "GIF"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert image_size(bytes(data)) == (91, 67)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff", b"BM", b"RIFF"])
def test_what_is_no_image_is_left_to_the_decoder(data):
    assert image_size(data) is None and refusal(data) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_is_not_prepared_either(kind):
    keep = make_filter(check=True, max_side=None)
    with pytest.raises(Unreadable, match=TOO_LARGE):
        keep(promising(kind))
    assert keep(encoded(PHOTO, kind)) == encoded(PHOTO, kind)
