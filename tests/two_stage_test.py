"""Stages in one command: each starts from the last one; a stop goes on where it was."""

import json
import runpy
import signal

import pytest
import tiny_run
from absl import flags

from unicl_jax import main, stages, train
from unicl_jax.checkpoint import Checkpoints
from unicl_jax.config import flatten, followed_by
from unicl_jax.errors import InputError
from unicl_jax.signals import Stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_run.write(tmp_path_factory.mktemp("two_stage"))


def recipe(folder, **changes):
    """SupCon, then a classifier on its tower."""
    made = []
    for more in (
        dict(objective="supcon", views=2, evaluations={}),
        dict(objective="cross_entropy", frozen=("image",)),
    ):
        config = tiny_run.config(folder, total_steps=4)
        config.optimizer.warmup_steps = 1
        del config.data.sources["captioned"]
        config.data.mixture = "proportional"
        config.checkpoint_every_steps = config.evaluate_every_steps = 2
        for name, value in more.items():
            config[name] = value
        made.append(config)
    config = followed_by(*made)
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        section = config
        for parent in parents:
            section = section[parent]
        section[leaf] = value
    return config


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was never stopped, and its scores."""
    workdir = folder / "whole"
    return workdir, stages.run(recipe(folder), workdir)


def test_the_second_stage_starts_from_the_first_ones_tower(whole):
    workdir, scores = whole
    assert scores.keys() == {"eval/held_out_top1", "eval/held_out_top5"}
    first, second = (tiny_run.saved(workdir / f"stage_{i}") for i in (1, 2))
    tower = {k: x for k, x in first.items() if "params']['image'" in k}
    assert len(tower) > 10
    tiny_run.assert_same_bits(tower, {k: second[k] for k in tower})
    said = json.loads((workdir / "stage_2" / "config.json").read_text())
    assert said["objective"] == "cross_entropy" and said["then"] == {}
    assert said["init_from"] == str(workdir / "stage_1")
    assert tiny_run.rows(workdir / "stage_2")[-1].keys() >= scores.keys()
    assert not any(
        "eval/" in k for row in tiny_run.rows(workdir / "stage_1") for k in row
    )


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stop_in_a_stage_goes_on_there(stage, folder, whole, monkeypatch):
    workdir, save = folder / f"stopped_{stage}", Checkpoints.save

    def save_and_stop(self, state, data_state):
        save(self, state, data_state)
        if f"stage_{stage}" in str(self._directory) and int(state.step) == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_and_stop)
        with pytest.raises(Stopped):
            stages.run(recipe(folder), workdir)
    assert (workdir / "stage_2").exists() == (stage == 2)
    moved = folder / f"moved_{stage}"
    workdir.rename(moved)
    ran, run = [], train.run
    monkeypatch.setattr(train, "run", lambda c, w: ran.append(c.objective) or run(c, w))
    assert stages.run(recipe(folder), moved) == whole[1]
    assert ran == ["supcon", "cross_entropy"][stage - 1 :]
    for i in (1, 2):
        tiny_run.assert_same_bits(
            tiny_run.saved(moved / f"stage_{i}"),
            tiny_run.saved(whole[0] / f"stage_{i}"),
        )


def test_what_stages_have_in_common_is_set_once(folder):
    config = recipe(folder, total_steps=9, data__templates="unicl_81", seed=3)
    config.then.seed = 4
    first, second = stages.stages(config)
    assert (first.total_steps, second.total_steps) == (9, 9)
    assert second.data.templates == "unicl_81"
    assert (first.seed, second.seed) == (3, 4)
    assert (first.views, second.views) == (2, 1)
    first.batch_size = 16  # stages are copies
    assert second.batch_size == 8


def test_the_second_stages_faults_are_told_before_the_first_starts(folder, tmp_path):
    config = recipe(folder, then__optimizer__learning_rate=-1.0)
    with pytest.raises(InputError, match="learning_rate must be above 0: got -1.0"):
        stages.run(config, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_another_config_for_a_stage_that_is_done_is_refused(folder, whole):
    config = recipe(folder, seed=5)
    with pytest.raises(InputError, match="seed: the run has 0, now 5"):
        stages.run(config, whole[0])


def test_a_run_of_one_stage_is_not_taken_for_two(folder, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="of this recipe's 2 stages"):
        stages.run(recipe(folder), tmp_path)


@pytest.mark.parametrize("variant", ["two_stage", "paper_two_stage"])
def test_the_recipe_is_its_two_variants(variant):
    get_config = runpy.run_path("configs/baselines/supcon.py")["get_config"]
    first, second = stages.stages(get_config(variant))
    paper = "paper" if variant.startswith("paper") else ""
    assert flatten(first) == flatten(get_config(paper))
    assert flatten(second) == flatten(get_config(f"{paper}_linear".strip("_")))


@pytest.fixture
def fresh_flags():
    def forget():
        for name in ("config", "workdir"):
            flags.FLAGS[name].unparse()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)  # overrides define themselves

    forget()
    flags.FLAGS.unparse_flags()
    yield
    forget()


# ml_collections reads recipes by a method that Python 3.12 deprecates.
@pytest.mark.filterwarnings(r"ignore:.*load_module\(\):DeprecationWarning")
def test_the_command_runs_stages(tmp_path, monkeypatch, fresh_flags):
    ran = []
    monkeypatch.setattr(stages.train, "run", lambda c, w: ran.append((c, w)))
    argv = [
        *("main.py", "--config=configs/baselines/supcon.py:two_stage"),
        *(f"--workdir={tmp_path / 'x'}", "--config.total_steps=200"),
        "--config.then.total_steps=150",
    ]
    monkeypatch.setattr("sys.argv", argv)
    assert main.main(argv) == 0
    assert [c.total_steps for c, _ in ran] == [200, 150]
    assert [w.name for _, w in ran] == ["stage_1", "stage_2"]
