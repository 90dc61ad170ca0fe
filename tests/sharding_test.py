"""The mesh and the rules: where arrays are cut, and that cutting changes nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from benchmarks import scaling_virtual
from unicl_jax import config as config_lib
from unicl_jax import encoders, sharding
from unicl_jax.encoders import IMAGE_TOWERS, TEXT_TOWERS
from unicl_jax.errors import InputError
from unicl_jax.program import make_program
from unicl_jax.sharding import FSDP_LEAST, TENSOR_RULES, make_mesh, mesh_sizes
from unicl_jax.validation import validate

BATCH, STEPS = 16, 3
BIG = (4 * FSDP_LEAST // 64, 64)


# --- The mesh.


def axes(data=None, fsdp=1, tensor=1):
    return dict(data=data, fsdp=fsdp, tensor=tensor)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (axes(), (8, 1, 1)),
        (axes(fsdp=8), (1, 8, 1)),
        (axes(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    ],
)
def test_what_data_does_not_say_is_what_the_others_leave(given, sizes):
    assert tuple(mesh_sizes(given, 8).values()) == sizes
    mesh = make_mesh(given)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (axes(fsdp=3), "number of devices, 8: got 2 x 3 x 1 = 6"),
        (axes(data=4), "got 4 x 1 x 1 = 4"),
        (axes(fsdp=16), "got 1 x 16 x 1 = 16"),
        (axes(fsdp=0), "mesh.fsdp must be a whole number of at least 1: got 0"),
        (axes(tensor=2.0), "mesh.tensor must be a whole number"),
        (axes(data=True), "mesh.data must be a whole number"),
    ],
)
def test_axes_that_do_not_make_the_devices_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        mesh_sizes(given, 8)


def test_devices_of_a_process_are_neighbours():
    class Device:
        def __init__(self, index, process_index):
            self.id, self.process_index = index, process_index

    mixed = [Device(i, i % 2) for i in range(8)]
    mesh = make_mesh(axes(fsdp=2, tensor=2), mixed)
    of = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert of.reshape(-1).tolist() == [0] * 4 + [1] * 4


# --- The rules.


@pytest.mark.parametrize(
    ("name", "shape", "cut"),
    [
        ("/params/image/layers_0_blocks_1/attn/qkv/kernel", BIG, ("fsdp", "tensor")),
        ("/params/image/layers_0_blocks_1/attn/proj/kernel", BIG, ("tensor", "fsdp")),
        ("/opt_state/0/mu/text/resblocks_3/mlp/c_fc/kernel", BIG, ("fsdp", "tensor")),
        ("/params/text/resblocks_3/mlp/c_proj/kernel", BIG, ("tensor", "fsdp")),
        ("/params/image/blocks_0/mlp/fc1/bias", (64,), ("tensor",)),
        ("/params/image/blocks_0/mlp/fc2/bias", (64,), ()),
        ("/params/text/token_embedding/embedding", BIG, ("fsdp", None)),
        ("/params/image_projection", (64, 2 * FSDP_LEAST), (None, "fsdp")),
        ("/params/image/conv/kernel", (3, 3, 64, FSDP_LEAST), (None,) * 3 + ("fsdp",)),
        # Nothing divisible, too small, and a scalar: whole.
        ("/params/image/patch_embed/kernel", (FSDP_LEAST + 1, 3), ()),
        ("/params/image/blocks_0/norm1/scale", (FSDP_LEAST // 2,), ()),
        ("/params/image/blocks_0/attn/qkv/kernel", (9, 3), ()),
        ("/step", (), ()),
    ],
)
def test_where_an_array_is_cut(name, shape, cut):
    sizes = dict(data=2, fsdp=2, tensor=2)
    assert sharding.partition(name, shape, sizes) == PartitionSpec(*cut)
    whole = sharding.partition(name, shape, dict(data=8, fsdp=1, tensor=1))
    assert whole == PartitionSpec()


@pytest.mark.parametrize(
    "kind, tower",
    [
        ("image", name)
        for name in ("swin_tiny", "vit_b32", "focalnet_tiny_lrf", "klite_focal_base")
    ]
    + [("text", "transformer"), ("text", "bert")],
)
def test_each_tower_of_blocks_has_maps_for_tensor(kind, tower):
    """At least a third of the numbers in its blocks, or a rule missed its names."""
    text = dict(vocab_size=512, context_length=16, width=64, num_heads=4, num_layers=2)
    made = IMAGE_TOWERS[tower]() if kind == "image" else TEXT_TOWERS[tower](**text)
    params, _ = jax.eval_shape(made.init, jax.random.key(0))
    counts = {"cut": 0, "whole": 0}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        if "embedding" in name:
            continue
        cut = sharding.partition(name, x.shape, dict(fsdp=1, tensor=2))
        counts["cut" if cut != PartitionSpec() else "whole"] += math.prod(x.shape)
    assert counts["cut"] > counts["whole"] / 2
    assert len(TENSOR_RULES) == 4


# --- A step on any mesh.


def small_config(mesh, optimizer="sgd"):
    """Swin and a transformer wide enough for rules to apply, drop path on."""
    c = config_lib.default()
    c.batch_size, c.total_steps, c.seed = BATCH, 10, 3
    c.model.image.update(
        name="swin",
        image_size=16,
        patch_size=4,
        window_size=2,
        embed_dim=48,
        depths=(1,),
        num_heads=(2,),
        drop_path=0.3,
    )
    c.model.text.update(
        name="transformer",
        vocab_size=256,
        context_length=8,
        width=64,
        num_heads=4,
        num_layers=1,
    )
    c.model.embed_dim = 64
    c.augment.flip, c.augment.color = True, 0.2
    # SGD, whose step shows the gradient: AdamW makes whole steps of round-off.
    c.optimizer.update(
        name=optimizer, learning_rate=0.1 if optimizer == "sgd" else 1e-3, clip_norm=1.0
    )
    c.mesh.update(mesh)
    c.data.sources.made_up = dict(format="npz", path="x", kind="image_label")
    return c


def batch():
    rng = np.random.default_rng(0)
    return dict(
        image=rng.integers(0, 256, (BATCH, 16, 16, 3), dtype=np.uint8),
        label=rng.integers(-1, 4, BATCH).astype(np.int32),
        tokens=rng.integers(1, 256, (BATCH, 8)).astype(np.int32),
    )


def trained(mesh_axes, devices, start=None, optimizer="sgd"):
    """A few steps: their losses and norms, and the state they leave.

    From `start`, if there is one: making a state takes as long to compile as the step.
    """
    config = small_config(mesh_axes, optimizer)
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    program = make_program(config, encoders.from_config(config.model), mesh, 4)
    layout = jax.tree.map(lambda x: x.sharding, program.state)
    state = program.init() if start is None else jax.device_put(start, layout)
    first, rows = jax.device_get(state), sharding.global_batch(mesh, batch())
    said = []
    for step in range(STEPS):
        state, metrics = program.train_step(state, rows, np.int32(step))
        keys = ("loss", "grad_norm", "update_norm", "param_norm")
        said.append([float(metrics[key]) for key in keys])
    return np.array(said), state, program, first


@pytest.fixture(scope="module")
def alone():
    return trained({}, 1)


@pytest.mark.parametrize(
    "mesh_axes",
    [{}, dict(fsdp=8), dict(fsdp=2, tensor=2)],
    ids=lambda axes: "x".join(axes) or "data",
)
def test_training_is_the_same_on_any_mesh(mesh_axes, alone):
    said, state, program, _ = trained(mesh_axes, 8, alone[3])
    # Only the order of float32 sums differs: over rows, and over parts of a row.
    np.testing.assert_allclose(said, alone[0], rtol=2e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(alone[1].params),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=str(path))
    # It stays where it was made: nothing is gathered from step to step.
    for x, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(program.state), strict=True
    ):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


def test_under_fsdp_a_device_holds_its_share_of_the_state():
    config = small_config(dict(fsdp=8), "adamw")
    mesh = make_mesh(config.mesh)
    program = make_program(config, encoders.from_config(config.model), mesh)
    state = program.init()
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    here = [x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state)]
    small = [x.nbytes for x in jax.tree.leaves(state) if x.size < FSDP_LEAST]
    assert sum(here) == (whole - sum(small)) / 8 + sum(small)
    assert sum(here) < whole / 4
    # No program that makes it holds an array whole.
    text = program.init.lower().compile().as_text()
    largest = max(state.params["text"]["token_embedding"].values(), key=jnp.size)
    assert f"f32[{','.join(map(str, largest.shape))}]" not in text


# --- What the config's check says.


@pytest.mark.parametrize(
    ("changes", "devices", "processes", "said"),
    [
        (dict(fsdp=3), 8, 1, "mesh.data x mesh.fsdp x mesh.tensor must be"),
        (dict(tensor=8), 8, 2, "mesh.tensor must divide the devices of a process"),
        (dict(fsdp=4), 12, 1, "along mesh|by the number of devices: got 16 for 12"),
        (dict(fsdp=2, tensor=2), 24, 1, "along mesh.data and mesh.fsdp: got 16 for 12"),
    ],
)
def test_validation_names_the_axis(changes, devices, processes, said):
    with pytest.raises(InputError, match=said):
        validate(small_config(changes), devices, processes)


def test_rows_are_counted_without_tensor():
    validate(small_config(dict(tensor=4)), 64)  # 16 rows, 16 x 4 devices


@pytest.mark.slow
def test_two_processes_with_fsdp_across_them_train_as_one(tmp_path):
    """The command itself: 2 processes x 4 devices, and 1 process x 1."""
    losses = {}
    for processes, devices, mesh in ((1, 1, ()), (2, 4, ("fsdp=8",))):
        workdir = tmp_path / f"{processes}"
        flags = ["--config.batch_size=32", "--config.total_steps=8"]
        flags += [f"--config.mesh.{axis}" for axis in mesh]
        scaling_virtual.train(workdir, processes, devices, flags)
        losses[processes] = scaling_virtual.read(workdir)["losses"]
    assert len(losses[1]) == 8
    # Sums over processes are Gloo's, in an order of their own, and AdamW makes whole
    # steps of what is all round-off.
    np.testing.assert_allclose(losses[2], losses[1], rtol=1e-4)
