"""configs/own_data.py on some sixty pictures of one's own: folders and a table."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from real_files import Image

from unicl_jax import train
from unicl_jax.errors import InputError

COLOURS = {
    "deep_red": (200, 20, 30),
    "green": (30, 180, 40),
    "sky_blue": (90, 160, 250),
    "yellow": (240, 220, 30),
}
RECIPE = Path(__file__).parents[1] / "configs" / "own_data.py"


def draw(path, colour, seed):
    """A picture of a colour, a little uneven."""
    noise = np.random.default_rng(seed).integers(-20, 21, (20, 24, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The files of a user: labelled, captioned, held out; some of them broken."""
    folder = tmp_path_factory.mktemp("own")
    lines = ["file_name,title"]
    for i in range(20):
        colour = list(COLOURS)[i % 4]
        draw(folder / "pictures" / colour / f"{i}.png", colour, i)
        draw(folder / "held out" / colour / f"{i}.jpg", colour, 100 + i)
        draw(folder / "more" / f"{i}.webp", colour, 200 + i)
        lines += [f"more/{i}.webp,something {colour.replace('_', ' ')}"]
        lines += [f'more/{i}.webp,"number {i}, {colour}"']
    (folder / "pictures" / "green" / "broken.jpg").write_bytes(b"no picture")
    (folder / "pictures" / "green" / "notes.txt").write_bytes(b"no picture")
    (folder / "captions.csv").write_text("\n".join([*lines, "more/0.webp,", ""]))
    return folder


def small(own, variant="", steps=30):
    """The recipe with its paths, as the command line sets them, and a smaller model."""
    config = runpy.run_path(str(RECIPE))["get_config"](variant).lock()
    if variant != "captions":
        config.data.sources.labels.path = str(own / "pictures")
    if variant != "labels":
        config.data.sources.captions.path = str(own / "captions.csv")
    config.batch_size, config.total_steps, config.optimizer.warmup_steps = 16, steps, 5
    config.evaluate_every_steps = config.checkpoint_every_steps = 20
    config.model.image.image_size, config.model.image.patch_size = 32, 8
    config.model.image.depths, config.model.image.num_heads = (1,), (1,)
    config.model.text.vocab_size, config.model.text.context_length = 600, 16
    return config


def test_a_run_learns_from_folders_and_a_table(own, tmp_path):
    config = small(own)
    config.evaluations.held_out.path = str(own / "held out")
    scores = train.run(config, tmp_path / "run")
    assert scores["eval/held_out_top1"] >= 0.9  # a quarter by chance
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if "loss" in row][-1]
    assert last["label_share"] == 0.5
    assert last["skipped/captions/empty caption"] == 1
    assert last["skipped/labels/no image suffix"] == 1
    assert last["skipped/labels/image cannot be decoded"] == 1  # in all epochs
    broken = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert broken.count("image cannot be decoded") == 1
    assert last["epochs/labels"] == 30 * 8 / 21
    assert (tmp_path / "run" / "predictions.png").is_file()


@pytest.mark.parametrize("variant", ["labels", "captions"])
def test_labels_or_captions_alone_are_enough_without_a_held_out_folder(
    variant, own, tmp_path
):
    config = small(own, variant, steps=6)
    assert train.run(config, tmp_path / "run") == {}
    assert list(config.data.sources) == [variant]


def test_held_out_classes_are_called_as_the_labels_are_unless_set(own):
    config = small(own)
    config.data.sources.labels.class_names = "names.txt"
    assert config.evaluations.held_out.class_names == "names.txt"
    config.evaluations.held_out.class_names = "others.txt"
    assert config.data.sources.labels.class_names == "names.txt"


def test_a_folder_that_is_not_there_is_named(own, tmp_path):
    config = small(own)
    config.data.sources.labels.path = "pictrues"
    with pytest.raises(InputError, match='source "labels": .*"pictrues" cannot be li'):
        train.run(config, tmp_path / "run")
