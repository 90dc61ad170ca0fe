"""RandAugment's ops against Pillow, on a real photograph-like image."""

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the ops under test are OpenCV's")
Image = pytest.importorskip("PIL.Image", reason="it is the reference")
from PIL import ImageEnhance, ImageOps  # noqa: E402
from real_files import encoded  # noqa: E402

from unicl_jax.data import preprocess, randaugment  # noqa: E402

FILL = (124, 116, 104)
GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
STRENGTHS = (0.0, 0.37, 0.9, 1.0)


def picture(size=(64, 48), low=20, high=230):
    """Smooth colours with some noise: many values, uneven histograms."""
    rng = np.random.default_rng(0)
    rough = rng.integers(low, high, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-9, 9, (*size[::-1], 3))
    return Image.fromarray(np.clip(noisy, low, high).astype(np.uint8))


def by_affine(image, matrix):
    """Pillow's affine transform as timm calls it, bilinear."""
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix,
        resample=Image.Resampling.BILINEAR,
        fillcolor=FILL,
    )


def solarized_add(image, addition):
    """What timm writes out, for Pillow has none."""
    table = [min(255, i + addition) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


def posterized(image, bits):
    """Pillow's, and the black of no bits at all, which it has come to refuse."""
    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


# Name -> function of (image, strength, sign): Pillow under timm's ranges.
PILLOW = {
    "auto_contrast": lambda i, a, s: ImageOps.autocontrast(i),
    "equalize": lambda i, a, s: ImageOps.equalize(i),
    "invert": lambda i, a, s: ImageOps.invert(i),
    "rotate": lambda i, a, s: i.rotate(
        s * 30 * a, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    ),
    "posterize": lambda i, a, s: posterized(i, 4 - int(a * 4)),
    "solarize": lambda i, a, s: ImageOps.solarize(i, 256 - int(a * 256)),
    "solarize_add": lambda i, a, s: solarized_add(i, int(a * 110)),
    "color": lambda i, a, s: ImageEnhance.Color(i).enhance(1 + s * 0.9 * a),
    "contrast": lambda i, a, s: ImageEnhance.Contrast(i).enhance(1 + s * 0.9 * a),
    "brightness": lambda i, a, s: ImageEnhance.Brightness(i).enhance(1 + s * 0.9 * a),
    "sharpness": lambda i, a, s: ImageEnhance.Sharpness(i).enhance(1 + s * 0.9 * a),
    "shear_x": lambda i, a, s: by_affine(i, (1, s * 0.3 * a, 0, 0, 1, 0)),
    "shear_y": lambda i, a, s: by_affine(i, (1, 0, 0, s * 0.3 * a, 1, 0)),
    "translate_x": lambda i, a, s: by_affine(
        i, (1, 0, s * 0.45 * a * i.width, 0, 1, 0)
    ),
    "translate_y": lambda i, a, s: by_affine(
        i, (1, 0, 0, 0, 1, s * 0.45 * a * i.height)
    ),
}


def at_rim(moved):
    """Pixels within one of the edge of what is moved, or of the picture."""
    outside = np.pad((moved == FILL).all(2), 1, constant_values=True)
    height, width = moved.shape[:2]
    shifts = [outside[i : i + height, j : j + width] for i, j in np.ndindex(3, 3)]
    return np.any(shifts, 0) & ~np.all(shifts, 0)


@pytest.mark.parametrize("name", PILLOW)
def test_every_op_equals_pillows(name):
    for image in (picture(), picture((33, 33), 0, 255)):
        for strength in STRENGTHS:
            for sign in (-1.0, 1.0):
                expected = np.asarray(PILLOW[name](image, strength, sign)).astype(int)
                found = randaugment.OPS[name](np.asarray(image), strength, sign)
                assert found.dtype == np.uint8
                difference = np.abs(found.astype(int) - expected).max(2)
                if name not in GEOMETRY:
                    assert difference.max() == 0, (strength, sign)
                    continue
                # Pillow cuts fractions off, OpenCV rounds them; and it mixes the rim
                # of the moved picture with what is around it.
                assert difference[~at_rim(expected)].max() <= 2, (strength, sign)


def test_the_ops_are_timms_fifteen():
    assert list(randaugment.OPS) == list(PILLOW) and len(PILLOW) == 15


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_flat_image_has_no_contrast_to_stretch(value):
    flat = np.full((8, 8, 3), value, np.uint8)
    for name in ("auto_contrast", "equalize"):
        np.testing.assert_array_equal(randaugment.OPS[name](flat, 0.9, 1.0), flat)


def augmented(image, seeds, **options):
    """Runs the whole policy over seeds."""
    pixels = np.asarray(image)
    return np.stack([randaugment.randaugment(pixels, k, **options) for k in seeds])


def test_the_policy_is_a_function_of_the_seed():
    image = picture((32, 32))
    first, again = (augmented(image, range(60)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({pixels.tobytes() for pixels in first}) > 30
    assert first.shape == (60, 32, 32, 3) and first.dtype == np.uint8


def test_each_op_acts_on_half_of_the_images():
    unchanged = (augmented(picture((32, 32)), range(400), num_ops=1)).reshape(400, -1)
    share = (unchanged == np.asarray(picture((32, 32))).reshape(-1)).all(1).mean()
    assert 0.4 < share < 0.6  # binomial(400, 1/2) within 4 sigma


def test_no_op_is_no_change():
    image = picture((32, 32))
    found = augmented(image, range(5), num_ops=0)
    assert (found == np.asarray(image)).all()


def test_erasing_puts_noise_into_one_rectangle_of_the_right_share():
    size, count = 64, 400
    pixels = np.full((size, size, 3), 255, np.uint8)
    found = np.stack(
        [randaugment.random_erasing(pixels, i, 0.25) for i in range(count)]
    )
    assert (pixels == 255).all()  # it makes a copy
    changed = (found != 255).any(3)
    erased = changed.any((1, 2))
    assert 0.16 < erased.mean() < 0.34  # binomial(400, 1/4) within 4 sigma
    shares, noise = [], []
    for mask, image in zip(changed[erased], found[erased], strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.mean() > 0.99  # full, but for noise that happens to be white
        shares.append(box.size / size**2)
        noise.append(image[mask])
    # Rounding to whole pixels moves the smallest box by up to 10 %.
    assert 0.015 < min(shares) and max(shares) < 0.35
    assert 0.14 < np.mean(shares) < 0.22  # uniform on (0.02, 1/3): mean 0.177
    noise = np.concatenate(noise) / 255
    # The cut to [0, 255] takes some of the tails: 2 % at either side.
    np.testing.assert_allclose(noise.mean(0), (0.485, 0.456, 0.406), atol=0.02)
    np.testing.assert_allclose(noise.std(0), (0.229, 0.224, 0.225), atol=0.02)


def test_the_settings_switch_augmentation_on_in_training_alone():
    image = picture((64, 64))
    data = encoded(image, "PNG")
    settings = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    strong = {**settings, "randaugment": {"num_ops": 3}, "erasing": 1.0}
    plain, changed = (
        preprocess.make_preprocess("made", s, 64, train=True)
        for s in (settings, strong)
    )
    assert all((plain(data, s) == np.asarray(image)).all() for s in range(8))
    assert all((changed(data, s) != np.asarray(image)).any() for s in range(8))
    centre = preprocess.make_preprocess("made", strong, 56, train=False)
    expected = np.asarray(image)[4:60, 4:60]
    np.testing.assert_array_equal(centre(data, 0), expected)
    with pytest.raises(ValueError, match='did you mean "magnitude"'):
        wrong = {"randaugment": {"magnitud": 9}}
        preprocess.make_preprocess("made", wrong, 64, train=True)
    with pytest.raises(ValueError, match="erasing must be a probability: got 25"):
        preprocess.make_preprocess("made", {"erasing": 25}, 64, train=True)
