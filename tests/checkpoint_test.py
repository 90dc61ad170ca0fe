"""Checkpoints by themselves: what is kept, what damage does, other meshes.

The state is a few arrays of every kind of dtype and layout; no model, no step.
"""

import gc
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from unicl_jax import restoring, sharding
from unicl_jax.checkpoint import Checkpoints, NotSaved
from unicl_jax.digest import digest
from unicl_jax.errors import InputError
from unicl_jax.save_clock import SaveClock
from unicl_jax.step import TrainState
from unicl_jax.workdir import saved_steps

# Orbax's other reads go on after one has failed, and find their event loop closed.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def no_leftovers():
    """What they left is collected here, not in another file's test."""
    yield
    gc.collect()


def arrays(step, seed=0):
    rng = np.random.default_rng(seed)
    return TrainState(
        step=np.int32(step),
        params={
            "kernel": rng.normal(size=(64, 96)).astype(np.float32),
            "bias": rng.normal(size=96).astype(jnp.bfloat16),
        },
        model_state={},
        opt_state=(
            {"mu": {"kernel": rng.normal(size=(64, 96)).astype(np.float32)}},
            {"count": np.int32(step)},
        ),
        nonfinite={"total": np.int32(2), "in_a_row": np.int32(1)},
    )


def mesh_of(devices, **axes):
    axes = dict(data=None, fsdp=1, tensor=1) | axes
    return sharding.make_mesh(axes, jax.devices()[:devices])


def placed(state, mesh):
    return jax.tree.map(jax.device_put, state, sharding.over_state(mesh, state))


def abstract(state, mesh):
    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        state,
        sharding.over_state(mesh, state),
    )


def save(workdir, steps, mesh=None, kept=9, keep_every=0):
    mesh = mesh or mesh_of(2, fsdp=2)
    checkpoints = Checkpoints(workdir, kept, keep_every)
    for step in steps:
        assert checkpoints.save(placed(arrays(step, step), mesh), {"step": step})
    checkpoints.close()


def restore(workdir, mesh=None, like=None):
    """What is found, and the lines that are said."""
    said = []
    checkpoints = Checkpoints(workdir, 9)
    like = like or abstract(arrays(0), mesh or mesh_of(2, fsdp=2))
    try:
        found = checkpoints.restore(like, said.append)
    finally:
        checkpoints.close()
    return found, said


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run with checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("two")
    save(workdir, [3, 6])
    return workdir


@pytest.fixture
def run(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def data_files(workdir, step):
    """The files that hold the arrays, the largest first."""
    state = workdir / "checkpoints" / str(step) / "state"
    found = [p for p in state.rglob("*") if p.is_file() and p.parent.name == "d"]
    return sorted(found, key=lambda p: -p.stat().st_size)


# --- Which there are.


def test_the_newest_are_kept_and_multiples_for_ever(tmp_path):
    save(tmp_path, [1, 2, 3, 4, 5, 6, 7], kept=2, keep_every=3)
    assert saved_steps(tmp_path) == [3, 6, 7]


def test_what_a_kill_left_is_removed(run):
    torn = run / "checkpoints" / "9.orbax-checkpoint-tmp" / "state"
    torn.mkdir(parents=True)
    (torn / "part").write_text("x")
    found, said = restore(run)
    assert found[1] == {"step": 6} and not said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["3", "6"]


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    assert restore(tmp_path) == (None, [])


def test_what_cannot_be_written_is_said_in_a_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(NotSaved, match="must be written to .*none is there. Make room"):
        checkpoints.save(placed(arrays(1), mesh_of(1)), {"step": 1})
        checkpoints.wait()
    checkpoints.close()


# --- Other meshes.


@pytest.mark.parametrize(
    "devices, axes",
    [
        (8, dict(fsdp=8)),
        (8, dict()),
        (1, dict()),
        (4, dict(fsdp=2, tensor=2)),
        (6, dict(fsdp=3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("saved_on", [(8, dict(fsdp=8)), (1, dict())], ids=str)
def test_a_state_goes_to_any_mesh_bit_by_bit(tmp_path, devices, axes, saved_on):
    save(tmp_path, [5], mesh_of(saved_on[0], **saved_on[1]))
    mesh = mesh_of(devices, **axes)
    (state, position), said = restore(tmp_path, mesh)
    assert position == {"step": 5} and not said
    assert_same_bits(state, arrays(5, 5))
    layout = sharding.over_state(mesh, state)
    jax.tree.map(lambda x, at: x.sharding == at or pytest.fail(str(at)), state, layout)


# --- Damage.


def flip(path, place, bit=3):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def flip_in_the_middle(workdir):
    file = data_files(workdir, 6)[0]
    flip(file, file.stat().st_size // 2)


def truncate(workdir):
    file = data_files(workdir, 6)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def remove_array(workdir):
    data_files(workdir, 6)[0].unlink()


def remove_half(workdir):
    shutil.rmtree(workdir / "checkpoints" / "6" / "state" / "ocdbt.process_0")


def remove_all_but_the_name(workdir):
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "checkpoints" / "6").mkdir()


def empty_the_metadata(workdir):
    (workdir / "checkpoints/6/state/_METADATA").write_text("")


def another_position(workdir):
    (workdir / "checkpoints/6/data/metadata").write_text('{"step": 3}')


def no_position(workdir):
    shutil.rmtree(workdir / "checkpoints/6/data")


def broken_digest(workdir):
    (workdir / "checkpoints/6/digest/metadata").write_text('{"step": ')


@pytest.mark.parametrize(
    "damage, why",
    [
        (flip_in_the_middle, "are not what was saved, as|reading it failed"),
        (truncate, "reading it failed"),
        (remove_array, "reading it failed"),
        (remove_half, "reading it failed"),
        (remove_all_but_the_name, "reading it failed"),
        (empty_the_metadata, "reading it failed"),
        (another_position, r"its data position is \{'step': 3\}, not step 6"),
        (no_position, "reading it failed"),
        (broken_digest, "its digest cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_said_and_set_aside_for_the_one_before(
    run, damage, why
):
    damage(run)
    (state, position), said = restore(run)
    assert position == {"step": 3}
    assert_same_bits(state, arrays(3, 3))
    (line,) = said
    assert re.match("checkpoint 6 is damaged: ", line) and re.search(why, line), line
    assert line.endswith("It is 6.damaged from now on")
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["3", "6.damaged"]
    # And the run can save its step 6 again, and lose it again.
    save(run, [6])
    assert restore(run)[0][1] == {"step": 6}
    remove_all_but_the_name(run)
    assert "It is 6.damaged.2 from now on" in restore(run)[1][0]


def test_every_flipped_bit_is_harmless_or_found(run):
    """Each of them alone, all over the files: no wrong state is ever given out."""
    rng, found = np.random.default_rng(0), 0
    files = [p for p in (run / "checkpoints/6").rglob("*") if p.stat().st_size]
    files = [p for p in files if p.is_file()]
    for _ in range(40):
        size = np.array([p.stat().st_size for p in files])
        file = files[rng.choice(len(files), p=size / size.sum())]
        place, bit = rng.integers(file.stat().st_size), rng.integers(8)
        flip(file, place, bit)
        mesh = mesh_of(1)
        like = abstract(arrays(0), mesh)
        state, position = restoring.newest_whole(run / "checkpoints", like, str)
        aside = run / "checkpoints" / "6.damaged"
        if aside.exists():
            found += 1
            assert_same_bits(state, arrays(3, 3))
            aside.rename(run / "checkpoints" / "6")
        else:
            assert_same_bits(state, arrays(6, 6))
        flip(file, place, bit)
    assert found > 20


def test_where_none_is_whole_nothing_is_touched_and_nothing_starts_anew(run):
    for step in (3, 6):
        (run / f"checkpoints/{step}/data/metadata").write_text("null")
    for _ in range(2):  # the same at the next start
        with pytest.raises(
            InputError, match="none is .6: its data.*; 3: .*from step 0"
        ):
            restore(run)
        assert saved_steps(run) == [3, 6]


def test_another_models_checkpoint_is_refused_not_set_aside(run):
    like = arrays(0)
    like.params["kernel"] = np.zeros((64, 32), np.float32)
    with pytest.raises(
        InputError, match="checkpoint 6 .*must be of this model.*kernel"
    ):
        restore(run, like=abstract(like, mesh_of(1)))
    assert saved_steps(run) == [3, 6]


def test_one_checkpoint_of_other_shapes_is_damage_not_another_model(run):
    other = arrays(9)
    other.params["kernel"] = np.zeros((64, 32), np.float32)
    checkpoints = Checkpoints(run, 9)
    checkpoints.save(placed(other, mesh_of(1)), {"step": 9})
    checkpoints.close()
    found, said = restore(run)
    assert found[1] == {"step": 6}
    assert "kernel: (64, 32) there, (64, 96) here" in said[0]
    assert said[0].endswith("It is 9.damaged from now on")


def test_without_memory_nothing_is_damaged(run, monkeypatch):
    def no_memory(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", no_memory)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        restore(run)
    assert saved_steps(run) == [3, 6]


# --- Older ones.


def test_a_checkpoint_from_before_a_field_or_the_digest_goes_on(tmp_path):
    old = arrays(4)._asdict()
    del old["nonfinite"]
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        items = dict(
            state=ocp.args.StandardSave(old), data=ocp.args.JsonSave({"step": 4})
        )
        manager.save(4, args=ocp.args.Composite(**items))
    (state, _), said = restore(tmp_path)
    assert not said
    none_yet = {"total": np.int32(0), "in_a_row": np.int32(0)}
    assert_same_bits(state, arrays(4)._replace(nonfinite=none_yet))


# --- The digest.


def test_the_digest_is_its_formula_however_the_array_is_divided():
    state = arrays(7)._asdict()
    expected = {
        "params/kernel": state["params"]["kernel"].view(np.uint32),
        "params/bias": state["params"]["bias"].view(np.uint16),
        "step": np.uint32(7),
    }
    for mesh in (mesh_of(1), mesh_of(8, fsdp=8), mesh_of(4, fsdp=2, tensor=2)):
        found = digest(placed(state, mesh))
        assert len(found) == len(jax.tree.leaves(state))
        for name, bits in expected.items():
            bits = bits.astype(np.uint64).ravel()
            weights = 2 * np.arange(len(bits), dtype=np.uint64) + 1
            assert found[name] == int((bits * weights).sum()) % 2**32, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_one_changed_bit_and_two_swapped_elements_change_the_digest(dtype):
    x = (np.arange(24).reshape(2, 3, 4) % (2 if dtype == "bool" else 24)).astype(dtype)
    before = digest({"x": jnp.asarray(x)})
    swapped = x.copy()
    swapped[0, 0, 0], swapped[1, 2, 3] = x[1, 2, 3], x[0, 0, 0]
    assert digest({"x": jnp.asarray(swapped)}) != before
    width = 1 if dtype == "bool" else 8 * x.dtype.itemsize
    for bit in (0, width - 1):
        changed = x.copy()
        changed.reshape(-1)[5:6].view(f"u{x.dtype.itemsize}")[:] ^= 1 << bit
        assert digest({"x": jnp.asarray(changed)}) != before


# --- The clock.


def test_a_save_is_due_so_many_minutes_after_the_last(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = SaveClock(2.0)
    assert not clock.due(1)
    now[0] += 119
    assert not clock.due(2)
    now[0] += 1
    assert clock.due(3)
    clock.restart()
    assert not clock.due(4)
    assert not SaveClock(0.0).due(10**6)


class Store:
    """A key-value store between processes, as jax's coordinator has one."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        assert key not in self.values
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]


def test_processes_save_at_the_same_steps_by_the_first_ones_clock(monkeypatch):
    """In any order that steps allow: to be done, a step waits for all processes."""
    now, store, rng = [0.0], Store(), np.random.default_rng(0)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clocks, asked, due = [SaveClock(1.0) for _ in range(3)], [0] * 3, [[], [], []]
    for clock in clocks:
        clock._client = store
    while min(asked) < 300:
        # To ask at step n is to have seen step n - 1 done, which all have dispatched,
        # so that all have asked at step n - 2.
        i = rng.choice([i for i in range(3) if asked[i] - 1 <= min(asked)])
        now[0] += 1
        asked[i] += 1
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        if clocks[i].due(asked[i]):
            due[i].append(asked[i])
            clocks[i].restart()
    common = [[step for step in steps if step <= min(asked)] for steps in due]
    assert common[0] == common[1] == common[2] and len(common[0]) >= 10


def test_the_digest_lies_beside_the_state(two):
    named = json.loads((two / "checkpoints/6/digest/metadata").read_text())
    assert {"step", "params/kernel", "opt_state/0/mu/kernel"} <= named.keys()
    assert all(0 <= x < 2**32 for x in named.values())
