"""A recipe's config: every refusal, the run's directory, the recipes themselves."""

import copy
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from unicl_jax import config as config_lib
from unicl_jax import encoders
from unicl_jax.config import flatten, to_json
from unicl_jax.errors import InputError
from unicl_jax.optimizer import make_optimizer
from unicl_jax.validation import validate
from unicl_jax.workdir import prepare_workdir

DEVICES = 8


def good():
    """A small config that validates."""
    config = config_lib.default()
    config.batch_size = 16
    config.total_steps = 100
    config.model.image.name = "swin_tiny"
    config.model.image.image_size = 32
    config.model.text.name = "transformer"
    config.data.sources.shoes = dict(format="npz", path="x.npz", kind="image_label")
    config.data.sources.alt = dict(format="npz", path="y.npz", kind="image_text")
    config.evaluations.held_out = dict(
        format="npz", path="z.npz", templates="short", kind="image_label"
    )
    return config


def put(config, path, value):
    """Sets a field, whatever its type was."""
    *parents, leaf = path.split(".")
    for parent in parents:
        config = config[parent]
    with config.ignore_type():
        config[leaf] = value


def refusal(config, devices=DEVICES, processes=1):
    with pytest.raises(InputError) as caught:
        validate(config, devices, processes)
    return str(caught.value)


# --- validate


def test_a_good_config_validates_on_any_number_of_devices_that_divides_the_batch():
    for devices in (1, 2, 8, 16):
        validate(good(), devices)


@pytest.mark.parametrize(
    "field",
    [
        "batch_size",
        "total_steps",
        "evaluate_every_steps",
        "checkpoint_every_steps",
        "checkpoints_kept",
        "log_every_steps",
    ],
)
@pytest.mark.parametrize("value", [0, -8, 2.5, None, "8", True])
def test_counts_must_be_whole_and_positive(field, value):
    config = good()
    put(config, field, value)
    message = refusal(config, devices=1)
    assert message.startswith(f"{field} must be a whole number of at least 1")
    assert f"got {value}" in message


@pytest.mark.parametrize(
    "field, value, must",
    [
        ("optimizer.learning_rate", 0.0, "above 0"),
        ("optimizer.learning_rate", -1e-3, "above 0"),
        ("optimizer.learning_rate", float("nan"), "above 0"),
        ("optimizer.eps", 0.0, "above 0"),
        ("optimizer.final_learning_rate", -1.0, "at least 0"),
        ("optimizer.weight_decay", -0.1, "at least 0"),
        ("optimizer.clip_norm", -1.0, "at least 0"),
        ("optimizer.clip_norm", float("nan"), "at least 0"),
        ("optimizer.warmup_steps", -1, "at least 0"),
        ("optimizer.b1", 1.0, "in [0, 1)"),
        ("optimizer.b1", -0.1, "in [0, 1)"),
        ("optimizer.b2", 1.0, "in [0, 1)"),
        ("optimizer.momentum", 1.5, "in [0, 1)"),
        ("optimizer.warmup_steps", 100, "below total_steps"),
        ("augment.shift", -1, "in [0, 32) pixels"),
        ("augment.shift", 32, "in [0, 32) pixels"),
        ("augment.color", 1.0, "in [0, 1)"),
        ("augment.crop", 0.0, "in (0, 1], a share of the area"),
        ("augment.crop", 1.5, "in (0, 1], a share of the area"),
        ("augment.crop", float("nan"), "finite"),
        ("augment.grayscale", 1.1, "in [0, 1], a probability"),
        ("augment.blur", -1.0, "in [0, 32) pixels"),
        ("strong_augment.shift", 32, "in [0, 32) pixels"),
        ("strong_augment.shift", 1.5, "in [0, 32) pixels, whole ones"),
        ("strong_augment.crop", "0.5", "in (0, 1]"),
        ("strong_augment.crop", None, "in (0, 1]"),
        ("strong_augment.flip", 1, "in True or False"),
        ("views", 0, "a whole number from 1 to 16"),
        ("views", 1.5, "a whole number from 1 to 16"),
        ("views", True, "a whole number from 1 to 16"),
        ("data.image_size", 31, "a whole number of at least model.image.image_size"),
        ("augment.color", -0.1, "in [0, 1)"),
        ("optimizer.learning_rate", float("inf"), "finite"),
        ("seed", 10**20, "in [0, 2^31)"),
        ("seed", -1, "in [0, 2^31)"),
        ("total_steps", 10**11, "below 2^31"),
        ("model.embed_dim", 0, "a whole number of at least 1"),
        ("model.image.image_size", 0, "a whole number of at least 1"),
        ("model.image.window_size", -1, "a whole number of at least 1"),
        ("model.image.depths", [1, 0], "a whole number of at least 1"),
        ("model.text.context_length", 2.5, "a whole number of at least 1"),
        ("model.logit_scale_init", float("nan"), "finite"),
        ("model.logit_scale_init", 1000.0, "in (-80, 80)"),
        ("model.logit_scale_max", float("inf"), "finite"),
        ("model.image.drop_path", 2.0, "in [0, 1)"),
        ("model.image.init_std", -1.0, "above 0"),
        ("data.made_up_records", -1, "at least 0"),
        ("data.lanes", 0, "a whole number that divides batch_size"),
        ("data.lanes", 5, "a whole number that divides batch_size: got 5 and 16"),
        ("data.lanes", 2.0, "a whole number that divides batch_size"),
        ("data.window", -1, "a whole number in [0, 2^31)"),
        ("data.window", True, "a whole number in [0, 2^31)"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name_and_value(field, value, must):
    config = good()
    put(config, field, value)
    message = refusal(config)
    assert message.startswith(f"{field} must be {must}")
    assert f"got {value}" in message


@pytest.mark.parametrize(
    "synonyms",
    [None, "", "gs://a/names.txt", (("a", "b"), ("c", "d", "e")), [["a", "b"]]],
)
def test_synonyms_are_a_file_or_groups(synonyms):
    config = good()
    config.data.synonyms = synonyms
    validate(config, DEVICES)
    assert json.loads(to_json(config))["data"]["synonyms"] == flatten(config).get(
        "data.synonyms"
    )


@pytest.mark.parametrize(
    "synonyms",
    [("sofa", "couch"), (("sofa",),), ((1, 2),), 3, {"sofa": "couch"}, (None,)],
)
def test_synonyms_of_another_form_are_refused(synonyms):
    config = good()
    config.data.synonyms = synonyms
    message = refusal(config)
    assert message.startswith("data.synonyms must be a text file's path, or groups of")
    assert 'write (("sofa", "couch")' in message


def test_captions_are_told_apart_by_row_or_by_text():
    config = good()
    for identity in ("row", "text"):
        config.data.caption_identity = identity
        validate(config, DEVICES)
    config.data.caption_identity = "txt"
    assert 'data.caption_identity: got "txt"; did you mean "text"?' in refusal(config)


def test_what_is_frozen_is_a_tuple_of_parts_and_not_all_of_them():
    config = good()
    put(config, "frozen", "image")
    assert "must be a tuple of names: got 'image'; for one, write ('image',)" in (
        refusal(config)
    )
    config = good()
    config.init_from = "runs/before"
    config.frozen = config_lib.PARTS
    assert "must leave a part to learn" in refusal(config)
    config = good()
    config.frozen = ("image_projektion",)
    assert 'did you mean "image_projection"' in refusal(config)
    config.frozen = ("image_projection", "logit_scale")  # no tower: init_from or not
    validate(config, DEVICES)


@pytest.mark.parametrize(
    "field, value",
    [
        ("augment.crop", 1e-3),
        ("augment.grayscale", 1.0),
        ("views", 16),
        ("data.image_size", 32),
        ("optimizer.final_learning_rate", 0.0),
        ("optimizer.weight_decay", 0.0),
        ("optimizer.clip_norm", 0.0),
        ("optimizer.b1", 0.0),
        ("optimizer.warmup_steps", 99),
        ("augment.shift", 31),
        ("augment.color", 0.99),
    ],
)
def test_the_ends_of_the_ranges_are_allowed(field, value):
    config = good()
    put(config, field, value)
    validate(config, DEVICES)


@pytest.mark.parametrize(
    "batch, devices, nearest",
    [(1000, 64, "are 960 and 1024"), (17, 8, "are 16 and 24"), (5, 8, "is 8")],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(
    batch, devices, nearest
):
    config = good()
    config.batch_size = batch
    message = refusal(config, devices)
    assert f"got {batch} for {devices} devices" in message
    assert message.endswith(f"nearest {nearest}.")


def test_a_batch_of_one_has_nothing_to_contrast():
    config = good()
    config.batch_size = 1
    assert "batch_size must be at least 2" in refusal(config, devices=1)


@pytest.mark.parametrize(
    "typo, guess",
    [
        ("batchsize", "batch_size"),
        ("model.embed_dims", "embed_dim"),
        ("data.mixtures", "mixture"),
        ("augment.colour", "color"),
        ("optimizer.lerning_rate", "learning_rate"),
    ],
)
def test_a_field_that_does_not_exist_is_refused_with_a_guess(typo, guess):
    config = good()
    put(config, typo, 1)
    message = refusal(config)
    assert f'no config field "{typo}"' in message
    assert f'did you mean "{guess}"' in message


def test_a_field_that_resembles_nothing_is_refused_with_the_menu():
    config = good()
    config.augment.zzz = 1
    message = refusal(config)
    assert "did you mean" not in message
    assert all(name in message for name in ("color", "flip", "shift"))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_tower_needs_its_name(tower):
    config = good()
    del config.model[tower]["name"]
    assert f"model.{tower}.name must say which tower" in refusal(config)


def test_a_run_needs_a_source_and_no_evaluation():
    config = good()
    config.evaluations = {}
    validate(config, DEVICES)
    config.data.sources = {}
    assert "data.sources must name at least one source" in refusal(config)


@pytest.mark.parametrize(
    "group, missing",
    [
        ("data.sources.shoes", "format"),
        ("data.sources.shoes", "path"),
        ("data.sources.shoes", "kind"),
        ("evaluations.held_out", "format"),
        ("evaluations.held_out", "path"),
        ("evaluations.held_out", "templates"),
    ],
)
def test_a_source_must_say_what_it_is(group, missing):
    config = good()
    section = config
    for name in group.split("."):
        section = section[name]
    del section[missing]
    assert refusal(config) == f"{group} must say {missing}."


def test_shared_prompts_are_for_a_single_process():
    config = good()
    config.data.share_prompts = True
    validate(config, DEVICES, 1)
    message = refusal(config, processes=4)
    assert "data.share_prompts needs a single process: got 4" in message
    assert "--config.data.share_prompts=False" in message


# --- flatten and to_json


def test_the_saved_json_is_the_config():
    config = good()
    config.model.image.depths = (1, 1)
    assert flatten(json.loads(to_json(config))) == flatten(config)
    flat = flatten(config)
    assert flat["optimizer.b2"] == 0.999
    assert flat["model.image.depths"] == [1, 1]  # as JSON has it
    assert flat["data.sources.alt.path"] == "y.npz"


def test_empty_sections_and_unset_fields_are_kept_when_flattened():
    config = good()
    config.evaluations = {}
    assert flatten(config)["evaluations"] == {}
    assert flatten(config)["model.logit_scale_max"] is None
    assert flatten(json.loads(to_json(config))) == flatten(config)


# --- prepare_workdir


@pytest.mark.parametrize("there", [False, True])
def test_a_new_or_empty_workdir_gets_the_config(tmp_path, there):
    workdir = tmp_path / "a" / "b"
    if there:
        workdir.mkdir(parents=True)
    assert prepare_workdir(str(workdir), good(), write=True) == workdir
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        to_json(good())
    )
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_a_relative_workdir_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare_workdir("run", good(), write=True) == tmp_path / "run"


def test_only_the_writing_process_writes(tmp_path):
    prepare_workdir(tmp_path / "run", good(), write=False)
    assert not (tmp_path / "run").exists()


def start(tmp_path):
    """A run's directory as it is once something was learnt."""
    workdir = prepare_workdir(tmp_path / "run", good(), write=True)
    (workdir / "checkpoints" / "10").mkdir(parents=True)
    return workdir


def test_the_same_config_goes_on(tmp_path):
    workdir = start(tmp_path)
    assert prepare_workdir(workdir, good(), write=True) == workdir


def test_free_fields_may_change_and_are_saved(tmp_path):
    workdir, config = start(tmp_path), good()
    config.log_every_steps = 7
    config.evaluate_every_steps = 7
    config.checkpoint_every_steps = 7
    config.checkpoints_kept = 7
    config.evaluations = {}
    prepare_workdir(workdir, config, write=True)
    assert json.loads((workdir / "config.json").read_text())["checkpoints_kept"] == 7


def test_a_run_from_before_a_field_was_there_goes_on(tmp_path):
    """What a newer version added had its default's effect in an older one's runs."""
    prepare_workdir(tmp_path / "run", good(), write=True)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    saved = tmp_path / "run" / "config.json"
    config = json.loads(saved.read_text())
    for name in ("views", "frozen", "init_from", "strong_augment", "mix"):
        del config[name]
    del config["augment"]["crop"]
    saved.write_text(json.dumps(config))
    prepare_workdir(tmp_path / "run", good(), write=False)
    other = good()
    other.augment.crop = 0.5
    with pytest.raises(InputError, match="augment.crop: the run has 1.0, now 0.5"):
        prepare_workdir(tmp_path / "run", other, write=False)


def test_strong_views_need_a_second_view():
    config = good()
    config.strong_augment = {"crop": 0.5}
    assert "views is 1; set views to 2" in refusal(config)
    config.views = 2
    validate(config, DEVICES)


def test_another_config_is_refused_and_exactly_the_differences_are_named(tmp_path):
    workdir, config = start(tmp_path), good()
    config.batch_size = 32
    config.optimizer.b2 = 0.98
    config.model.image.depths = (1, 1)
    del config.data.sources.alt
    config.log_every_steps = 7  # free
    before = (workdir / "config.json").read_text()
    with pytest.raises(InputError) as caught:
        prepare_workdir(workdir, config, write=True)
    message = str(caught.value)
    named = [line.split(":")[0].strip() for line in message.splitlines()[1:-1]]
    assert named == [
        "batch_size",
        "data.sources.alt.format",
        "data.sources.alt.kind",
        "model.image.depths",
        "optimizer.b2",
    ]
    assert "batch_size: the run has 16, now 32" in message
    assert "name another directory" in message
    assert (workdir / "config.json").read_text() == before


def test_files_may_move_and_be_read_otherwise_between_two_starts(tmp_path):
    workdir, config = start(tmp_path), good()
    config.data.sources.shoes.path = "moved.npz"
    config.data.sources.shoes.index_cache = "here"
    prepare_workdir(workdir, config, write=True)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["data"]["sources"]["shoes"]["path"] == "moved.npz"


def test_a_run_that_has_learnt_nothing_yet_takes_another_config(tmp_path):
    """A first try with a wrong path must not block the second."""
    config = good()
    prepare_workdir(tmp_path / "run", config, write=True)
    config.data.sources.shoes.path = "right.npz"
    workdir = prepare_workdir(tmp_path / "run", config, write=True)
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["data"]["sources"]["shoes"]["path"] == "right.npz"


def test_a_directory_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"(?s)new, empty.*thesis\.tex.*another dir"):
        prepare_workdir(tmp_path, good(), write=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_kill_while_the_first_config_is_written_leaves_a_directory_to_go_on(tmp_path):
    (tmp_path / "config.json.new").write_text('{"batch_')
    workdir = prepare_workdir(tmp_path, good(), write=True)
    assert [p.name for p in workdir.iterdir()] == ["config.json"]


def test_a_workdir_that_cannot_be_made_is_refused(tmp_path):
    # A file in its place: this holds for root too, whom no permission stops.
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="must be a directory that can be written"):
            prepare_workdir(workdir, good(), write=True)


@pytest.mark.parametrize("text", ["", '{"batch_size": 1', "\xff", "[1, 2]", "3"])
def test_a_damaged_config_json_is_refused_by_name(tmp_path, text):
    workdir = start(tmp_path)
    (workdir / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"config\.json.* must hold a run's config"):
        prepare_workdir(workdir, good(), write=True)


# --- The recipes.

RECIPES = sorted((Path(__file__).parents[1] / "configs").rglob("*.py"))


def get_config(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def variants_of(path):
    """What the recipe says it has: the menu that it hands to `check_variant`."""
    menus = []
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(config_lib, "check_variant", lambda v, menu: menus.append(menu))
        get_config(path)()
    assert menus, f"{path.name} must check its variant"  # a baseline's base does, too
    return list(menus[0])


ALL = [(path, None) for path in RECIPES] + [
    (path, variant) for path in RECIPES for variant in variants_of(path)
]


def recipe(path, variant):
    return get_config(path)() if variant is None else get_config(path)(variant)


@pytest.mark.parametrize("path, variant", ALL, ids=lambda x: getattr(x, "stem", x))
def test_every_recipe_validates_and_its_model_and_optimizer_build(path, variant):
    config = recipe(path, variant)
    if config.frozen:
        with pytest.raises(InputError, match="init_from is not set; pass --config.in"):
            validate(config, DEVICES)
        config.init_from = "runs/the_stage_before"
    validate(config, DEVICES)
    # `train.run` reads these three for the data, whatever the towers' defaults are.
    for tower, option in (
        ("image", "image_size"),
        ("text", "context_length"),
        ("text", "vocab_size"),
    ):
        assert isinstance(config.model[tower][option], int)
    model = encoders.from_config(config.model)
    optimizer, _ = make_optimizer(config.optimizer, config.total_steps)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert params["image_projection"].shape[1] == config.model.embed_dim
    jax.eval_shape(optimizer.init, params)
    assert flatten(json.loads(to_json(config))) == flatten(config)


@pytest.mark.parametrize(
    ("group", "name", "field", "hint"),
    [
        ("data.sources", "shoes", "wieght", "weight"),
        ("data.sources", "shoes", "class_name", "class_names"),
        ("evaluations", "held_out", "template", "templates"),
    ],
)
def test_a_typo_in_a_source_suggests_the_name(group, name, field, hint):
    config = good()
    sources = config.data.sources if group == "data.sources" else config.evaluations
    sources[name][field] = 3
    message = refusal(config)
    assert message.startswith(f'{group}.{name}: a npz source has no "{field}"')
    assert f'did you mean "{hint}"' in message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_refuses_a_variant_it_does_not_have(path):
    with pytest.raises(InputError, match="no variant"):
        get_config(path)("nonsense")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_variant_changes_something(path):
    plain, variants = flatten(recipe(path, None)), variants_of(path)
    same = [v for v in variants if flatten(recipe(path, v)) == plain]
    # A recipe may name its default: one variant at most is the plain recipe itself.
    assert len(same) <= 1
    assert not same or same[0] == get_config(path).__defaults__[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_field_of_a_recipe_that_has_a_default_can_be_overridden(path):
    config = recipe(path, None)
    config.lock()
    changed = copy.deepcopy(config)
    changed.batch_size = 64
    changed.total_steps = 10
    changed.optimizer.warmup_steps = 2
    changed.model.logit_scale_max = 4.6  # None in `default`: a placeholder
    validate(changed, DEVICES)
