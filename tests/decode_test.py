"""Decoding and preprocessing against Pillow, on real bytes."""

import io

import numpy as np
import pytest
from real_files import SIZE, Image, encoded, photo, tf

from unicl_jax.data import decode, preprocess

LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("JPEG", "PNG", "GIF", "BMP") for mode in ("RGB", "L")]
    + [("JPEG", "CMYK"), ("PNG", "P"), ("GIF", "P"), ("WEBP", "RGB")],
)
def test_every_format_decodes_to_the_rgb_that_pillow_sees(kind, mode):
    data = encoded(photo(0).convert(mode), kind, **LOSSLESS.get(kind, {}))
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    found = decode.decode(tf.constant(data)).numpy().astype(int)
    # Both use libjpeg; CMYK goes through another formula in each.
    tolerance = 3 if mode == "CMYK" else 0
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


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
    found = decode.decode(tf.constant(data)).numpy().astype(int)
    # Pillow rounds the blend in another order.
    assert np.abs(found - np.asarray(expected)).max() <= 1


def preprocessed(data, seeds, train=True, size=SIZE, **settings):
    """Runs the preprocessing over seeds."""
    function = tf.function(preprocess.make_preprocess("made", settings, size, train))
    seeds = np.asarray(seeds, np.int64)
    return np.stack([function(tf.constant(data), seed).numpy() for seed in seeds])


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
    # Pillow rounds between its two passes; TensorFlow at the end.
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2


def test_a_jpeg_crop_is_the_crop_of_the_decoded_jpeg():
    data = encoded(photo(3, 201, 155), subsampling=2)
    pixels = decode.decode(tf.constant(data)).numpy()
    lossless = encoded(Image.fromarray(pixels), "PNG")
    jpeg, png = (preprocessed(d, range(20)).astype(int) for d in (data, lossless))
    # decode_and_crop smooths chroma at the window's rim without the pixels beyond.
    assert np.abs(jpeg - png).mean() < 0.2


def test_crops_follow_scale_and_ratio():
    uniform = np.random.default_rng(0).random((2000, 10, 4)).astype(np.float32)
    sample = tf.function(
        lambda u: preprocess.sample_crop(
            tf.constant(300), tf.constant(400), u, (0.08, 1.0), (3 / 4, 4 / 3)
        )
    )
    windows = np.stack([sample(u).numpy() for u in uniform])
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
    window = preprocess.sample_crop(
        tf.constant(100),
        tf.constant(1000),
        tf.fill([10, 4], 0.99),
        (1.0, 1.0),
        (3 / 4, 4 / 3),
    )
    assert window.numpy().tolist() == [0, 433, 100, 133]
    assert preprocessed(encoded(photo(0, 1, 40)), [1])[0].shape == (SIZE, SIZE, 3)


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
        corners.astype(int), [[130, 60, 206, 165], [18, 2, 196, 235]], atol=1
    )


@pytest.mark.parametrize("train", [True, False])
def test_resize_leaves_an_image_of_the_right_size_as_it_is(train):
    image = photo(3, SIZE, SIZE)
    (found,) = preprocessed(encoded(image, "PNG"), [7], train=train, name="resize")
    np.testing.assert_array_equal(found, np.asarray(image))
