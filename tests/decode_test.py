"""Decoding and preprocessing against Pillow, on real bytes."""

import io

import numpy as np
import pytest
from real_files import SIZE, Image, encoded, photo

from unicl_jax.data import decode, preprocess
from unicl_jax.data.draws import Draws

LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("JPEG", "PNG", "GIF", "BMP") for mode in ("RGB", "L")]
    + [("JPEG", "CMYK"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB")],
)
def test_every_format_decodes_to_the_rgb_that_pillow_sees(kind, mode):
    data = encoded(photo(0).convert(mode), kind, **LOSSLESS.get(kind, {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = decode.decode(data).astype(int)
    np.testing.assert_array_equal(found, expected)  # both use libjpeg


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA")]
)
def test_transparency_is_laid_on_white(kind, mode):
    image = photo(0)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert(mode)
    ground = Image.new("RGBA", image.size, "white")
    expected = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    data = encoded(image, kind, **LOSSLESS.get(kind, {}))
    found = decode.decode(data).astype(int)
    # Pillow rounds the blend in another order.
    assert np.abs(found - np.asarray(expected)).max() <= 1


def preprocessed(data, seeds, train=True, size=SIZE, **settings):
    """Runs the preprocessing over seeds."""
    function = preprocess.make_preprocess("made", settings, size, train)
    return np.stack([function(data, seed) for seed in seeds])


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (100, 90), (224, 224)])
def test_the_centre_crop_is_torchvisions_with_pillow(shape):
    image = photo(0, *shape)
    (found,) = preprocessed(encoded(image, "PNG"), [0], train=False, size=112)
    short = min(shape)
    size = [int(128 * side / short) for side in shape]
    left, top = (int(round((side - 112) / 2)) for side in size)
    expected = image.resize(size, Image.Resampling.BICUBIC).crop(
        (left, top, left + 112, top + 112)
    )
    np.testing.assert_array_equal(found, np.asarray(expected))


def decibels(found, expected):
    """Peak signal to noise ratio of two images."""
    error = np.mean((found.astype(float) - np.asarray(expected, float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    "shape", [(60, 50), (97, 71), (130, 90), (181, 178), (399, 640)]
)
def test_resizing_is_pillows_within_what_a_jpeg_loses(shape, interpolation):
    image = photo(0, *shape)
    filters = {"bicubic": 3, "bilinear": 2}
    expected = image.resize((64, 64), Image.Resampling(filters[interpolation]))
    found = preprocess.resize(np.asarray(image), (64, 64), interpolation)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    assert decibels(found, expected) > 40


@pytest.mark.parametrize("side", [70, 85, 101, 127, 150, 200, 333])
def test_resizing_takes_out_what_is_too_fine_as_pillow_does(side):
    noise = np.random.default_rng(0).normal(128, 30, (side, side, 3))
    noise = np.clip(noise, 0, 255).astype(np.uint8)
    expected = Image.fromarray(noise).resize((64, 64), Image.Resampling.BICUBIC)
    found = preprocess.resize(noise, (64, 64))
    ratio = found.std() / np.asarray(expected).std()
    assert 0.8 < ratio < 1.2
    assert decibels(found, expected) > 27  # half of 64 grey values' worth of noise


@pytest.mark.parametrize("exact", [False, True])
def test_a_crop_is_the_window_that_was_drawn(exact):
    image = photo(3, 201, 155)
    data = encoded(image, "PNG")
    found = preprocessed(data, range(20), exact=exact)
    for seed, crop in enumerate(found):
        draws = Draws(seed)
        draws.uniform()  # the flip's
        window = preprocess.sample_crop(155, 201, draws, (0.08, 1.0), (3 / 4, 4 / 3))
        top, left, height, width = window
        box = (left, top, left + width, top + height)
        expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        if exact:
            np.testing.assert_array_equal(crop, np.asarray(expected))
        else:
            assert decibels(crop, expected) > 40


@pytest.mark.parametrize("subsampling", [0, 2])
def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(subsampling):
    image = photo(3, 603, 465)
    data = encoded(image, subsampling=subsampling)
    pixels = encoded(Image.fromarray(decode.decode(data)), "PNG")
    jpeg, png = (preprocessed(d, range(20)) for d in (data, pixels))
    # A window of the smaller picture ends at whole pixels of that, of which there are
    # at least SIZE.
    assert min(decibels(a, b) for a, b in zip(jpeg, png, strict=True)) > 25
    sides = decode.decode(data, (100, 80)).shape[:2]
    assert sides == (117, 151)  # a quarter of it, rounded up
    assert decode.decode(data, (233, 1)).shape[:2] == (233, 302)
    assert decode.decode(data, (234, 302)).shape[:2] == (465, 603)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_bytes_that_are_cut_off_are_no_image(kind, share):
    data = encoded(photo(0), kind)
    with pytest.raises(ValueError):
        decode.decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"no image at all", b"GIF89a", b"\xff\xd8\xff" * 9])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ValueError):
        decode.decode(data)


def test_a_jpeg_that_is_odd_but_whole_is_an_image():
    whole = encoded(photo(0))
    expected = decode.decode(whole)
    odd = whole[:-2] + b"more" + whole[-2:]  # before the end's marker
    np.testing.assert_array_equal(decode.decode(odd), expected)
    np.testing.assert_array_equal(decode.decode(odd, (9, 9)), expected)
    scan = whole.index(b"\xff\xda") + 12
    odd = whole[:scan] + b"\x07" + whole[scan + 1 :]  # ends of a spectrum, not used
    np.testing.assert_array_equal(decode.decode(odd), expected)
    with pytest.raises(ValueError):  # but not all of it is there
        decode.decode(odd[: len(odd) // 2])


@pytest.mark.parametrize("sampling", [0x14, 0x31, 0x24])
def test_colours_sampled_in_odd_ways_are_pillows_to_decode(sampling):
    data = bytearray(encoded(photo(0)))
    data[data.index(b"\xff\xc0") + 11] = sampling
    image = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(decode.decode(bytes(data)), np.asarray(image))
    preprocessed(bytes(data), [0])


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1200, 30)])
def test_a_strip_is_not_enlarged_as_a_whole(shape, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def watched(self, size, *args, **kwargs):
        sizes.append(size)
        return resize(self, size, *args, **kwargs)

    data = encoded(photo(2, *shape), "PNG")
    monkeypatch.setattr(Image.Image, "resize", watched)
    (found,) = preprocessed(data, [0], train=False)
    assert max(map(max, sizes)) == SIZE
    monkeypatch.setattr(preprocess, "_STRIP", 10**9)
    (expected,) = preprocessed(data, [0], train=False)
    assert max(map(max, sizes)) > SIZE
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_sixteen_bits_are_cut_to_eight():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    found = decode.decode(encoded(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(found, (values >> 8)[..., None].repeat(3, 2))


def test_the_first_frame_of_an_animation_counts():
    first, second = photo(0), photo(1)
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encoded(first, kind, save_all=True, append_images=[second], **options)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        np.testing.assert_array_equal(decode.decode(data), np.asarray(expected))


def test_crops_follow_scale_and_ratio():
    windows = np.array(
        [
            preprocess.sample_crop(300, 400, Draws(k), (0.08, 1.0), (3 / 4, 4 / 3))
            for k in range(2000)
        ]
    )
    top, left, height, width = windows.T
    assert (windows >= 0).all()
    assert (top + height <= 300).all() and (left + width <= 400).all()
    share = height * width / 120_000
    # Half a pixel of rounding moves the share and ratio of the smallest window (85 px)
    # by 1.2 %.
    assert 0.079 < share.min() < 0.1 and share.max() > 0.9
    ratio = width / height
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert 0.95 < np.exp(np.log(ratio).mean()) < 1.05
    # A place is as likely at the start as at the end of the room.
    assert abs((top / np.maximum(300 - height, 1)).mean() - 0.5) < 0.03


def test_an_image_no_crop_fits_gives_its_largest_allowed_centre():
    bounds = (1.0, 1.0), (3 / 4, 4 / 3)
    assert preprocess.sample_crop(100, 1000, Draws(0), *bounds) == (0, 433, 100, 133)
    assert preprocess.sample_crop(1, 1, Draws(0), *bounds) == (0, 0, 1, 1)
    for shape in ((1, 40), (40, 1), (1, 1)):
        assert preprocessed(encoded(photo(0, *shape)), [1])[0].shape == (SIZE, SIZE, 3)


def test_half_of_the_images_are_mirrored_and_nothing_else_moves():
    data = encoded(photo(1))
    plain = preprocessed(data, range(200))
    flipped = preprocessed(data, range(200), flip=True)
    same = (plain == flipped).all((1, 2, 3))
    mirrored = (plain == flipped[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130  # binomial(200, 1/2) within 4 sigma


def test_the_crop_of_a_seed_stays_where_it_is():
    # Red grows by 2 a column, green by 3 a row: the corners tell the window.
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[..., 0] = 2 * np.arange(120)
    pixels[..., 1] = 3 * np.arange(80)[:, None]
    found = preprocessed(encoded(Image.fromarray(pixels), "PNG"), [7, 2**32 - 1])
    corners = np.concatenate([found[:, 0, 0, :2], found[:, -1, -1, :2]], 1)
    # A checkpoint resumes the same pictures only while this holds; the tolerance is
    # for the rounding of other processors.
    np.testing.assert_allclose(
        corners.astype(int), [[184, 141, 232, 231], [1, 14, 123, 181]], atol=1
    )


@pytest.mark.parametrize("train", [True, False])
def test_resize_leaves_an_image_of_the_right_size_as_it_is(train):
    image = photo(3, SIZE, SIZE)
    (found,) = preprocessed(encoded(image, "PNG"), [7], train=train, name="resize")
    np.testing.assert_array_equal(found, np.asarray(image))
