"""Losses that are no numbers: skipped, counted, listed, and at last the end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run

from unicl_jax import program, train
from unicl_jax.data import TrainIterator
from unicl_jax.errors import InputError
from unicl_jax.metrics import Metrics
from unicl_jax.nonfinite import NonFiniteSteps
from unicl_jax.objectives import Objective
from unicl_jax.step import TrainState, make_train_step
from unicl_jax.validation import validate

# --- The step by itself, on a model of one number.

GOOD, NAN, INF, BIG = range(4)  # what a batch does to the loss, by its labels
FACTORS = np.array([1.0, np.nan, np.inf, 3e38], np.float32)


class Toy:
    def logit_scale(self, params):
        return jnp.float32(1)


def toy(max_nonfinite, dtype=jnp.float32):
    def loss(forward):
        w = forward.own["w"].astype(dtype)
        # Of BIG, the square overflows in bfloat16 as in float32.
        x = (jnp.asarray(FACTORS, dtype)[forward.labels] * w) ** 2
        return x.astype(jnp.float32), {}

    schedule = optax.linear_schedule(0.1, 0.0, 10)
    optimizer = optax.sgd(schedule, momentum=0.5)
    step = make_train_step(
        *(Toy(), Objective(loss), optimizer, schedule, None),
        max_nonfinite=max_nonfinite,
    )
    params = {"objective": {"w": jnp.float32(1)}}
    nothing = dict(total=jnp.int32(0), in_a_row=jnp.int32(0))
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params), nothing)
    return jax.jit(step), state


def run(step, state, kinds, first=0):
    """The state and the metrics after each of a few batches."""
    found = []
    for i, kind in enumerate(kinds, first):
        batch = dict(label=jnp.full(2, kind, jnp.int32))
        state, metrics = step(state, batch, np.int32(i))
        found.append((jax.device_get(state), jax.device_get(metrics)))
    return found


def learnt(state):
    return jax.tree.leaves((state.params, state.opt_state, state.model_state))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [NAN, INF, BIG])
def test_a_step_that_is_not_finite_is_skipped_and_counted(kind, dtype):
    before, skipped, after = run(*toy(2, dtype), [GOOD, kind, GOOD])
    assert learnt(skipped[0]) == learnt(before[0]) != learnt(after[0])
    assert [int(s.step) for s, _ in (before, skipped, after)] == [1, 2, 3]
    counts = [s.nonfinite for s, _ in (before, skipped, after)]
    assert [int(c["total"]) for c in counts] == [0, 1, 1]
    assert [int(c["in_a_row"]) for c in counts] == [0, 1, 0]
    assert [m["nonfinite"] for _, m in (before, skipped, after)] == [0, 1, 1]
    assert [m["halted"] for _, m in (before, skipped, after)] == [0, 0, 0]
    assert skipped[1]["update_norm"] == 0 and not np.isfinite(skipped[1]["loss"])


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used():
    """optax counts updates: a skipped one does not take the schedule further."""
    kinds = [GOOD, NAN, GOOD, NAN, NAN, GOOD]
    rates = [m["learning_rate"] for _, m in run(*toy(3), kinds)]
    np.testing.assert_allclose(rates, [0.1, 0.09, 0.09, 0.08, 0.08, 0.08], rtol=1e-6)
    # Momentum starts from 0: the first update is the gradient 2 w, times the rate.
    (first, _), _, (third, metrics) = run(*toy(3), kinds[:3])
    w = [s.params["objective"]["w"] for s in (first, third)]
    trace = 2 * w[0] + 0.5 * 2 * 1.0
    assert w[0] - w[1] == pytest.approx(metrics["learning_rate"] * trace, rel=1e-5)


def test_past_the_limit_the_state_stays_as_it_was_step_included():
    found = run(*toy(2), [GOOD, NAN, NAN, NAN, GOOD])
    states, metrics = zip(*found, strict=True)
    assert [m["halted"] for m in metrics] == [0, 0, 0, 1, 1]
    for state in states[3:]:  # the last one was drawn for another step than its own
        assert int(state.step) == 3
        assert state.nonfinite == states[2].nonfinite
        assert learnt(state) == learnt(states[0])


def test_the_limit_is_of_a_row_and_nought_stops_at_the_first():
    metrics = [m for _, m in run(*toy(1), [NAN, GOOD, NAN, GOOD, NAN])]
    assert [m["halted"] for m in metrics] == [0] * 5 and metrics[-1]["nonfinite"] == 3
    ((state, metrics),) = run(*toy(0), [NAN])
    assert metrics["halted"] == 1 and int(state.step) == 0


def test_counts_go_on_from_where_they_were():
    kinds = [GOOD, NAN, NAN, GOOD, NAN, GOOD]
    step, state = toy(2)
    whole = run(step, state, kinds)[-1][0]
    for cut in range(1, 6):
        middle = run(step, state, kinds[:cut])[-1][0]
        again = run(step, jax.device_put(middle), kinds[cut:], cut)[-1][0]
        assert jax.tree.leaves(again) == jax.tree.leaves(whole)


@pytest.mark.parametrize(
    "field, value",
    [("max_nonfinite", -1), ("max_nonfinite", -30)]
    + [("checkpoints_keep_every", -2), ("hang_minutes", -1.0)]
    + [("checkpoint_every_minutes", float("nan"))],
)
def test_wrong_values_are_refused(field, value, folder):
    with pytest.raises(InputError, match=f"{field} must be .*: got {value}"):
        validate(tiny_run.config(folder, **{field: value}), 8)


# --- In a run.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def poison(monkeypatch):
    """Makes the batches of some steps give NaN, by pixels that no record has."""
    steps = set()
    drawn, views = TrainIterator.__next__, program.make_views

    def poisoned(self):
        batch = drawn(self)
        if self.state()["step"] in steps:
            batch = batch | dict(image=np.full_like(batch["image"], 255))
        return batch

    def make_views(*args, **kwargs):
        made = views(*args, **kwargs)

        def with_nan(key, images):
            bad = jnp.where(jnp.all(images == 255), jnp.nan, 0.0)
            found = made(key, images)
            return found._replace(images=found.images + bad)

        return with_nan

    monkeypatch.setattr(TrainIterator, "__next__", poisoned)
    monkeypatch.setattr(program, "make_views", make_views)
    return steps


def test_a_run_skips_says_and_lists_a_bad_step_and_goes_on(
    folder, poison, tmp_path, capsys
):
    poison |= {4}
    config = tiny_run.config(folder)
    train.run(config, tmp_path)
    out = capsys.readouterr().out
    assert out.count("step 4: loss nan, gradient norm nan: the update is skipped") == 1
    steps = [row for row in tiny_run.rows(tmp_path) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert [row["nonfinite"] for row in steps] == [0, 0, 0, 1, 1, 1]
    assert all("halted" not in row for row in steps)
    assert steps[3]["loss"] is None and steps[4]["loss"] > 0
    (line,) = tiny_run.rows(tmp_path, "nonfinite.jsonl")
    assert (line["step"], line["loss"]) == (4, "nan") and len(line["records"]) == 8
    arrays = tiny_run.saved(tmp_path, 6)
    assert all(np.isfinite(x).all() for x in arrays.values())
    assert arrays["['nonfinite']['total']"] == 1


def test_the_records_that_are_listed_are_those_of_the_batch(folder):
    config = tiny_run.config(folder)
    batches = train.data.make_train_iterator(
        *(config.data, 16, 8, config.seed, train.data.Tokenizer(12, 600)),
        process_index=1,
        process_count=2,
    )
    sources = {source.name: source for source in batches.sources}
    next(batches), next(batches)
    batch = next(batches)
    mine = batches.records(3)[4:]
    batches.close()
    for record, label in zip(mine, batch["label"], strict=True):
        index = record["index"]
        is_labelled = record["source"] == "labelled"
        assert label == (index % 3 if is_labelled else -1)
        assert 0 <= index < len(sources[record["source"]])


def test_one_too_many_stops_the_run_at_the_last_good_state(
    folder, poison, tmp_path, capsys
):
    poison |= {3, 4, 5}
    config = tiny_run.config(folder, max_nonfinite=2, evaluate_every_steps=100)
    for _ in range(2):  # the same batches are met again
        with pytest.raises(train.NonFiniteLoss, match="step 5 gave.*the 2 bef"):
            train.run(config, tmp_path)
        listed = tiny_run.rows(tmp_path, "nonfinite.jsonl")
        assert [line["step"] for line in listed] == [3, 4, 5]
    arrays = tiny_run.saved(tmp_path, 4)
    assert arrays["['step']"] == 4 and arrays["['nonfinite']['in_a_row']"] == 2
    # A higher limit is no other run: it goes on from there.
    train.run(tiny_run.config(folder, max_nonfinite=3), tmp_path)
    steps = [row for row in tiny_run.rows(tmp_path) if "loss" in row]
    assert [row["nonfinite"] for row in steps] == [0, 0, 1, 2, 3, 3]
    listed = tiny_run.rows(tmp_path, "nonfinite.jsonl")
    assert [line["step"] for line in listed] == [3, 4, 5]
    whole = tmp_path / "whole"
    train.run(tiny_run.config(folder, max_nonfinite=3), whole)
    tiny_run.assert_same_bits(tiny_run.saved(tmp_path, 6), tiny_run.saved(whole, 6))


# --- Lists and metrics on a full disk.


def test_lines_of_steps_that_are_run_again_are_dropped(tmp_path):
    path = tmp_path / "nonfinite.jsonl"
    path.write_text('{"step": 2}\n{"step": 5}\n{"step": 7}\n{"step": 9, "lo')
    NonFiniteSteps(tmp_path, 5, True, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 5}\n'


def test_a_full_disk_does_not_stop_what_only_reports(tmp_path):
    """/dev/full takes nothing, as a full disk does."""
    said = []
    metrics = Metrics(tmp_path, 0, True, said.append)
    steps = NonFiniteSteps(tmp_path, 0, True, 3, said.append)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")
    for step in range(3):
        metrics.write(step, {"loss": 1.0})
    metrics.close()
    assert len(said) == 1 and "training goes on, lines may be missing" in said[0]
    (tmp_path / "nonfinite.jsonl").symlink_to("/dev/full")
    scalars = dict(loss=float("nan"), grad_norm=1.0, nonfinite=1.0, halted=0.0)
    steps.add(7, scalars, lambda step: [])
    assert "its records cannot be written" in said[1] and "No space left" in said[1]
