"""Averages of the parameters: their law, where they are kept, who uses them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_test import good, put, refusal
from jax.sharding import AxisType, Mesh
from objectives_test import CONCEPTS, OPTIMIZER, make_batch, model

import unicl_jax
from unicl_jax import checkpoint, encoders, objectives, sharding, train
from unicl_jax.augment import make_views
from unicl_jax.checkpoint import Checkpoints
from unicl_jax.config import PARTS, to_json
from unicl_jax.errors import InputError
from unicl_jax.evaluation import Scores
from unicl_jax.optimizer import make_optimizer
from unicl_jax.step import TrainState, averaged, init_state, make_train_step, start_ema
from unicl_jax.workdir import prepare_workdir

DECAY, STILL = 0.25, dict(shift=0, color=0.0, flip=False)
FROZEN = ("text",)


@functools.cache
def setup():
    """A step of linear towers, one of them frozen, and its first state on the host."""
    objective = objectives.make_objective("unicl", model(), None, CONCEPTS)
    optimizer, schedule = make_optimizer(OPTIMIZER, 1000)
    options = dict(frozen=FROZEN, ema_decay=DECAY)
    parts = model(), objective, optimizer
    step = make_train_step(*parts, schedule, make_views(STILL), **options)
    state = jax.jit(lambda: init_state(*parts, 0, **options))()
    return jax.jit(step), jax.tree.map(np.array, state)


def assert_same(got, want, **tolerance):
    tolerance = tolerance or dict(rtol=0, atol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def test_the_average_warms_up_to_its_decay_and_leaves_out_what_is_frozen():
    step, state = setup()
    assert set(state.ema) == set(PARTS) - set(FROZEN)
    want = {name: state.params[name] for name in state.ema}
    assert_same(state.ema, want)
    for i in range(4):
        state, _ = step(state, make_batch(False), jnp.int32(i))
        decay = min(DECAY, (1 + i) / (10 + i))  # 0.1, 0.18, 0.25, 0.25
        want = jax.tree.map(
            lambda a, b, d=decay: d * a + (1 - d) * b,
            want,
            {name: state.params[name] for name in want},
        )
        assert_same(state.ema, want, rtol=1e-6, atol=1e-7)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), averaged(state), state.params
    )
    assert max(jax.tree.leaves(moved["text"])) == 0
    assert max(jax.tree.leaves(moved["image"])) > 1e-3
    # A batch of another step is not learnt from, and nothing is averaged.
    after, _ = step(state, make_batch(False), jnp.int32(9))
    assert_same(after.ema, state.ema)


def test_a_resumed_run_has_the_same_averages(tmp_path):
    step, state = setup()
    batch = make_batch(False)
    state, _ = step(state, batch, jnp.int32(0))
    one = Checkpoints(tmp_path, 2)
    one.save(state, {"step": 1})
    one.close()
    other = Checkpoints(tmp_path, 2)
    restored, _ = other.restore(jax.tree.map(jnp.asarray, setup()[1]))
    other.close()
    both = [step(x, batch, jnp.int32(1))[0] for x in (state, restored)]
    assert_same(*both)


def test_without_averages_a_checkpoint_is_as_it_was_before_there_were_any(tmp_path):
    state = jax.tree.map(jnp.asarray, setup()[1])._replace(ema={}, step=jnp.int32(5))
    one = Checkpoints(tmp_path, 2)
    one.save(state, {"step": 5})
    one.close()

    metadata = json.loads((tmp_path / "checkpoints/5/state/_METADATA").read_text())
    assert not [key for key in metadata["tree_metadata"] if "ema" in key]
    other = Checkpoints(tmp_path, 2)
    restored, _ = other.restore(state)
    other.close()
    assert isinstance(restored, TrainState) and restored.ema == {}
    assert_same(restored, state)


def test_averages_lie_where_their_parameters_do():
    devices = np.array(jax.devices()[:8]).reshape(2, 4, 1)
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    kernel = jax.ShapeDtypeStruct((128, 96), np.float32)
    params = {"image": {"mlp": {"fc1": {"kernel": kernel}}}}
    layout = sharding.over_state(mesh, {"params": params, "ema": params})
    assert layout["ema"] == layout["params"]
    spec = layout["ema"]["image"]["mlp"]["fc1"]["kernel"].spec
    assert "fsdp" in spec


# --- A run with averages, made by hand: what uses it takes them.

TEXT = dict(vocab_size=600, context_length=8, width=16, num_heads=2, num_layers=1)


def small():
    config = good()
    config.ema_decay, config.model.embed_dim = 0.9, 8
    config.model.image.update(name="vit", image_size=8, patch_size=4, width=8)
    config.model.image.update(num_layers=1, num_heads=2)
    config.model.text.update(TEXT)
    return config


@pytest.fixture
def trained(tmp_path):
    """A workdir whose averages are twice its parameters; its text tower is frozen."""
    config = small()
    two = encoders.from_config(config.model)
    params, model_state = jax.jit(two.init)(jax.random.key(0))
    doubled = {k: jax.tree.map(lambda x: 2 * x, v) for k, v in params.items()}
    del doubled["text"]
    none = dict(total=jnp.int32(0), in_a_row=jnp.int32(0))
    state = TrainState(jnp.int32(4), params, model_state, (), none, doubled)
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(state, {"step": 4})
    checkpoints.close()
    (tmp_path / "config.json").write_text(to_json(config))
    return tmp_path, state


def test_a_loaded_run_is_its_averages(trained):
    workdir, state = trained
    loaded = unicl_jax.load(workdir)
    assert_same(loaded.params, averaged(state))
    assert loaded.logit_scale == pytest.approx(np.exp(2.0))


def test_another_run_starts_from_the_averages(trained):
    workdir, state = trained
    zeros = jax.tree.map(jnp.zeros_like, state)._replace(step=jnp.int32(0))
    got, step = checkpoint.load_towers(workdir, zeros, PARTS)
    assert step == 4
    assert_same(got.params, averaged(state))
    got = start_ema(got)
    assert_same(got.ema, {k: got.params[k] for k in state.ema})
    # Of parts alone: the frozen tower, of which there is no average, and one other.
    got, _ = checkpoint.load_towers(workdir, zeros, ("text", "image_projection"))
    assert_same(got.params["text"], state.params["text"])
    assert_same(got.params["image_projection"], state.ema["image_projection"])
    assert not np.any(got.params["text_projection"])


def test_averages_are_not_turned_on_in_the_middle_of_a_run(tmp_path):
    config = small()
    config.ema_decay = 0.0
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    old = json.loads(to_json(config))
    del old["ema_decay"]  # a run that is older than the field
    (tmp_path / "config.json").write_text(json.dumps(old))
    prepare_workdir(tmp_path, config, write=True)
    config.ema_decay = 0.9
    with pytest.raises(InputError, match="ema_decay: the run has 0.0, now 0.9"):
        prepare_workdir(tmp_path, config, write=True)


def test_an_evaluations_name_says_that_it_is_of_averages():
    scores = {"shoes": Scores({"top1": 0.5, "top5": 0.75})}
    plain = train._by_metric_key(scores, 0.0)
    assert set(plain) == {"eval/shoes_top1", "eval/shoes_top5"}
    ema = train._by_metric_key(scores, 0.9)
    assert set(ema) == {"eval/shoes_ema_top1", "eval/shoes_ema_top5"}


def test_a_decay_that_is_none_is_refused():
    config = good()
    for value in (1.0, -0.1, True, "0.9"):
        put(config, "ema_decay", value)
        assert "ema_decay must be in [0, 1), 0 for off" in refusal(config)
