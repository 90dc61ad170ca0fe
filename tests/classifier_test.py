"""Class embeddings and batches of texts against one text at a time."""

import jax
import numpy as np
import pytest

from unicl_jax import encoders, sharding
from unicl_jax.data import Tokenizer, load_templates
from unicl_jax.encoders.packing import Packed
from unicl_jax.errors import InputError
from unicl_jax.evaluation import classifier, texts
from unicl_jax.evaluation.classifier import class_embeddings, make_prompts

NAMES = ("Crane", "tench", "great white shark", "crane", "sea snake, of the deep sea")
TEMPLATES = ("a {}.", "a photo of the large {} in the wild.", "{}")
LENGTH, VOCAB = 40, 1000
tokenize = Tokenizer(LENGTH, VOCAB)
SMALL = dict(context_length=LENGTH, vocab_size=VOCAB, width=32, num_heads=2)
TOWERS = {
    "causal": dict(name="transformer", num_layers=2, causal=True),
    "not_causal": dict(name="transformer", num_layers=2, causal=False),
    "bert": dict(name="bert", num_layers=2, hidden=64, pad_id=VOCAB - 1),
}


class Tower:
    """A real text tower with its projection, and what it was given."""

    def __init__(self, name, mesh):
        config = SMALL | TOWERS[name]
        self.tower = encoders.options("text", config)
        encoder = encoders.one_tower("text", config)
        self.params, _ = jax.jit(encoder.init)(jax.random.key(1))
        self.params = jax.tree.map(lambda x: x * 2, self.params)  # texts far apart
        self.shapes, self.mesh = [], mesh
        rows, whole = sharding.over_batch(mesh), sharding.replicated(mesh)
        self.one = jax.jit(
            lambda t: encoders.unit(encoder.apply(self.params, {}, t)[0])
        )

        def encode(params, state, tokens):
            self.shapes.append(jax.tree.map(np.shape, tokens))
            return encoders.unit(encoder.apply(params, state, tokens)[0])

        layout = dict(in_shardings=(None, None, rows), out_shardings=whole)
        self.encode = jax.jit(encode, **layout)

    def classes(self, prompts, tower="own", **given):
        tower = self.tower if tower == "own" else tower
        return class_embeddings(
            self.encode, self.params, {}, prompts, self.mesh, tower, **given
        )

    def by_hand(self, names, templates, tokens_of=tokenize):
        """One text at a time, in all its slots."""
        found = []
        for name in names:
            rows = [
                np.asarray(self.one(tokens_of([t.replace("{}", name)])))[0]
                for t in templates
            ]
            mean = np.mean(rows, 0, dtype=np.float64)
            found.append(mean / np.linalg.norm(mean))
        return np.array(found)


def padded_with_0(given):
    """As K-LITE's towers and BERT's tokenizers have it."""
    tokens = tokenize(given)
    after = np.arange(LENGTH) > tokens.argmax(1)[:, None]
    return np.where(after, 0, tokens)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("tower", TOWERS)
def test_classes_are_unit_means_of_single_texts(make_mesh, tower, devices):
    model = Tower(tower, make_mesh(devices))
    found = model.classes(make_prompts(NAMES, TEMPLATES, tokenize))
    assert found.dtype == np.float32 and found.shape == (5, 32)
    expected = model.by_hand(NAMES, TEMPLATES)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    # The classes are not all alike: a mix-up of texts would be seen.
    assert np.abs(expected[[0, 1, 2]] - expected[[1, 2, 4]]).max(1).min() > 1e-3


@pytest.mark.parametrize("tower", ["not_causal", "bert"])
def test_a_tower_that_sees_all_but_padding_gets_no_padding(make_mesh, tower):
    model = Tower(tower, make_mesh(1))
    pad, of = (VOCAB - 1, tokenize) if tower == "bert" else (0, padded_with_0)
    assert model.tower.get("pad_id", 0) == pad
    prompts = make_prompts(NAMES, TEMPLATES, of)
    found = model.classes(prompts)
    expected = model.by_hand(NAMES, TEMPLATES, of)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert max(shape[1] for shape in model.shapes) < LENGTH


def test_padding_that_is_seen_is_kept(make_mesh):
    """End-of-text behind a text, where the tower takes 0 for padding."""
    model = Tower("not_causal", make_mesh(1))
    prompts = make_prompts(NAMES, TEMPLATES, tokenize)
    model.classes(prompts)
    assert [shape[1] for shape in model.shapes] == [LENGTH]
    # And what it would be without: something else.
    cut = prompts._replace(tokens=prompts.tokens[:, :24])
    assert np.abs(model.classes(cut) - model.classes(prompts)).max() > 1e-3


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("slots", [40, 128, 300])
def test_batches_of_any_size_give_the_same(make_mesh, monkeypatch, tower, slots):
    model = Tower(tower, make_mesh(2))
    prompts = make_prompts(
        [f"{n} {i}" for n in NAMES for i in range(9)], TEMPLATES, tokenize
    )
    whole = model.classes(prompts)
    monkeypatch.setattr(texts, "SLOTS", slots)
    calls = []
    parts = model.classes(prompts, between=lambda: calls.append(1))
    np.testing.assert_allclose(parts, whole, rtol=0, atol=2e-6)
    assert len(calls) > 3


def test_an_unknown_tower_is_given_all_slots(make_mesh):
    model = Tower("not_causal", make_mesh(1))
    model.classes(make_prompts(NAMES, TEMPLATES, tokenize), tower=None)
    assert [shape[1] for shape in model.shapes] == [LENGTH]


def test_equal_texts_are_encoded_once_and_count_as_often_as_they_occur(make_mesh):
    templates = ("a {}", "a {}", "A {}", "the {}")
    prompts = make_prompts(NAMES, templates, tokenize)
    # "Crane" and "crane" are one to the tokenizer; three of the templates are.
    assert len(prompts.tokens) == 4 * 2 and len(prompts.index) == 5 * 4
    np.testing.assert_array_equal(prompts.index[:4], [0, 0, 0, 1])
    model = Tower("causal", make_mesh(8))
    expected = model.by_hand(NAMES, templates)
    np.testing.assert_allclose(model.classes(prompts), expected, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(*model.classes(prompts)[[0, 3]])


def test_features_keep_the_order_of_their_texts(make_mesh):
    model = Tower("causal", make_mesh(8))
    given = [f"{'very ' * (i % 7)}old {name}" for i in range(30) for name in NAMES]
    given = given + given[:10]
    tokens = tokenize(given)
    found = texts.text_features(
        model.encode, model.params, {}, tokens, model.mesh, model.tower
    )
    np.testing.assert_allclose(found, np.asarray(model.one(tokens)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("groups", [1, 3, 8])
@pytest.mark.parametrize("tower", [{"causal": True}, {"causal": False}, None])
@pytest.mark.parametrize("count", [1, 2, 17, 500])
@pytest.mark.parametrize("longest", [3, 12, 77])
def test_each_text_is_in_one_batch_at_its_place(
    monkeypatch, groups, tower, count, longest
):
    monkeypatch.setattr(texts, "SLOTS", 1024)
    rng = np.random.default_rng(0)
    tokens = np.zeros((count, 77), np.int32)
    for i, n in enumerate(rng.integers(3, longest + 1, count)):
        tokens[i, :n] = [98, *rng.integers(1, 98, n - 2), 99]
    batches = texts.in_batches(tokens, tower, groups)
    assert sorted(np.concatenate([b.texts for b in batches])) == list(range(count))
    shapes = set()
    for batch in batches:
        shapes.add(str(jax.tree.map(np.shape, batch.tokens)))
        for text, row in zip(batch.texts, batch.rows, strict=True):
            real = tokens[text][tokens[text] > 0]
            if not isinstance(batch.tokens, Packed):
                np.testing.assert_array_equal(batch.tokens[row][: len(real)], real)
                continue
            group, nth = divmod(row, batch.tokens.ends.shape[1])
            slots = batch.tokens.by_groups().tokens[group].reshape(-1)
            end = batch.tokens.ends[group, nth] + 1
            np.testing.assert_array_equal(slots[end - len(real) : end], real)
    causal = tower is not None and tower["causal"]
    assert len(shapes) <= (1 if causal else 2 if tower is None else 12)
    if causal and count == 500 and longest < 77:  # no more slots than there must be
        used = sum(b.tokens.tokens.size for b in batches)
        assert used < 1.5 * tokens.astype(bool).sum() + 1024 * groups


def test_real_prompts_fill_their_rows():
    from importlib import resources

    path = resources.files("unicl_jax.data") / "class_names" / "imagenet.txt"
    names = path.read_text(encoding="utf-8").splitlines()[::10]
    templates = load_templates("clip_imagenet_80")
    prompts = make_prompts(names, templates, Tokenizer())
    batches = texts.in_batches(prompts.tokens, {"causal": True}, 1)
    ids = (prompts.tokens.argmax(1) + 1).sum()
    assert len({str(jax.tree.map(np.shape, b.tokens)) for b in batches}) == 1
    slots = sum(batch.tokens.tokens.size for batch in batches)
    assert slots < 1.15 * ids  # the last batch may be half empty
    assert slots < prompts.tokens.size / 6


def test_tasks_of_a_suite_share_their_shapes(make_mesh):
    model = Tower("causal", make_mesh(1))
    for some in range(1, 31):
        names = [f"{name} {i}" for name in NAMES for i in range(some)]
        model.classes(make_prompts(names, TEMPLATES, tokenize))
    assert len(model.shapes) <= 7  # of 30 tasks, 15 to 450 prompts


def test_sums_do_not_depend_on_the_order_of_parts():
    rng = np.random.default_rng(0)
    prompts = classifier.Prompts(
        np.zeros((50, 4), np.int32), rng.integers(0, 50, 60), num_classes=12
    )
    rows = rng.normal(size=(50, 8)).astype(np.float32)
    expected = rows[prompts.index].astype(np.float64).reshape(12, 5, 8).mean(1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(50)
        parts = [(p, rows[p]) for p in np.array_split(order, 1 + 3 * seed)]
        found = classifier.mean_by_class(parts, prompts)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)


def test_between_may_end_it(make_mesh):
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        model = Tower("causal", make_mesh(1))
        model.classes(make_prompts(NAMES, TEMPLATES, tokenize), between=stop)


@pytest.mark.parametrize(
    "names, templates, said",
    [
        ((), TEMPLATES, "class names must be one text or more: got"),
        ("tench", TEMPLATES, "class names must be one text or more: got 'tench'"),
        (NAMES, (), "templates must be one text or more"),
        (NAMES, "a {}", "templates must be one text or more: got 'a {}'"),
        (NAMES, ("a", "{}"), "exactly once: got 'a'"),
    ],
)
def test_wrong_input_is_named(names, templates, said):
    with pytest.raises(InputError, match=said):
        make_prompts(names, templates, tokenize)
