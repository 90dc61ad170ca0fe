"""`benchmarks/parity.py`: two towers at full size, its pieces, and what the docs say.

What it found of all towers is data, in `benchmarks/results`.
"""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from benchmarks import parity, peers

ROOT = Path(__file__).parents[1]
# Rows of docs/models.md that are not headed by the tower's name alone.
IN_DOCS = {"clip_text": "`transformer`, `eps=1e-5`"}


def imported(*names):
    """The libraries, or a skip; what they warn about while imported is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            pytest.importorskip(name, reason="it has the models to compare with")
            for name in names
        ]


# --- At full size.


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["swin_tiny", "focalnet_tiny_lrf"])
def test_a_full_size_tower_has_its_peers_float64_features(tower):
    imported("torch", "timm", "open_clip")
    found = parity.Pair(tower, images=2).compare("float64")
    # Two float64 programs: 5e-16 and 4e-15 were measured.
    assert found["features"] < 1e-10


# --- Pieces.


def test_an_error_is_relative_to_the_largest_number():
    want = np.array([[1.0, -8.0], [0.0, 2.0]])
    assert parity.relative_error(want + [[0, 0], [0.5, 0]], want) == 0.5 / 8


def test_the_worst_array_of_gradients_counts_however_small_it_is():
    want = {"large": np.array([1e3, 2.0]), "small": {"bias": np.array([1e-6, 0.0])}}
    got = {"large": np.array([1e3, 2.0]), "small": {"bias": np.array([1e-6, 1e-8])}}
    assert parity.gradient_error(got, want) == pytest.approx(1e-2)
    # Round-off of what is 0 has no digits of its own.
    want["small"]["bias"] = np.array([1e-17, 0.0])
    got["small"]["bias"] = np.array([-1e-17, 1e-16])
    assert parity.gradient_error(got, want) == pytest.approx(1e-19)


def test_every_other_text_ends_early_and_is_padded():
    tokens = peers.inputs("clip_text", 2)
    clip, bert = parity.shortened(tokens, None), parity.shortened(tokens, 0)
    end, quarter = peers.VOCAB - 1, peers.LENGTH // 4
    for got in (clip, bert):
        np.testing.assert_array_equal(got[0], tokens[0])
        np.testing.assert_array_equal(got[1, :quarter], tokens[1, :quarter])
    assert (clip.argmax(1) == [peers.LENGTH - 1, quarter]).all()
    assert (clip[1, quarter:] == end).all() and (bert[1, quarter:] == 0).all()


def test_weights_read_as_another_tower_are_told():
    found = {"text": {"name": "transformer", "eps": 1e-5}}
    parity.check_told("clip_text", found)
    with pytest.raises(ValueError, match="of transformer.*text.eps', 1e-05, 1e-12"):
        parity.check_told("transformer", found)


def test_no_weight_of_a_peer_is_left_at_zero_or_one():
    (torch,) = imported("torch")
    model = torch.nn.ModuleDict(
        dict(
            conv=torch.nn.Conv2d(3, 8, 3),
            bn=torch.nn.BatchNorm2d(8),
            norm=torch.nn.LayerNorm(8),
            embedding=torch.nn.Embedding(5, 8),
        )
    )
    model.register_parameter("gamma", torch.nn.Parameter(torch.ones(8)))
    for name, value in peers.randomized(model).state_dict().items():
        if value.is_floating_point():
            assert len(set(value.flatten().tolist()) - {0.0, 1.0}) == value.numel()
        centre = float(name.endswith(("norm.weight", "bn.weight", "var", "gamma")))
        assert abs(value.float().mean() - centre) < 0.4, name


def test_timm_reads_the_names_that_its_focalnet_goes_out_by():
    """`checkpoint_filter_fn` takes the authors' files, so those names are theirs."""
    torch, focalnet = imported("torch", "timm.models.focalnet")
    model = focalnet.FocalNet(
        num_classes=0,
        embed_dim=8,
        depths=(1, 2),
        focal_levels=(2, 3),
        focal_windows=(3, 3),
        layerscale_value=0.1,
        use_post_norm=True,
        use_post_norm_in_modulation=True,
    )
    peers.randomized(model)
    want = {name: value.clone() for name, value in model.state_dict().items()}
    arrays = {name: value.numpy() for name, value in want.items()}
    release = peers.focalnet_release(arrays)
    assert {"layers.0.downsample.norm.weight", "patch_embed.proj.bias"} <= set(release)
    assert not set(release) & {"stem.proj.weight", "layers.1.downsample.norm.weight"}
    there = {name: torch.tensor(value) for name, value in release.items()}
    again = focalnet.checkpoint_filter_fn(there, model)
    assert again.keys() == want.keys()
    for name, value in again.items():
        assert torch.equal(value, want[name]), name


# --- The docs.


def tables(text):
    """First cell of a row -> {column: cell}, of every table of a page."""
    rows, header = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif not re.fullmatch(r":?-+:?", cells[0]):
            rows[cells[0]] = dict(zip(header, cells, strict=True))
    return rows


def test_docs_say_what_was_measured():
    page = (ROOT / "docs" / "models.md").read_text()
    rows = {name: row for name, row in tables(page).items() if "float64" in row}
    found = json.loads((ROOT / "benchmarks/results/parity_cpu.json").read_text())
    told = {name for name, row in rows.items() if row["float64"] not in ("", "—")}
    names = {tower: IN_DOCS.get(tower, f"`{tower}`") for tower in found["towers"]}
    assert told == set(names.values())
    for tower, measured in found["towers"].items():
        row, cells = rows[names[tower]], parity.cells(measured)
        for column in ("parameters", "GFLOP", "float64", "float32", "gradients"):
            assert row[column] == cells[column], (tower, column)


def test_what_was_measured_is_within_the_bounds():
    found = json.loads((ROOT / "benchmarks/results/parity_cpu.json").read_text())
    assert set(found["towers"]) == set(parity.TOWERS)
    for tower, each in found["towers"].items():
        # Two float64 programs; and float32's 6e-8, some dozens of layers deep.
        assert each["float64"]["features"] < 1e-10, tower
        assert each["float64"]["gradients"] < 1e-10, tower
        assert each["float32"]["features"] < 1e-5, tower
