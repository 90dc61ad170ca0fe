"""BERT's weights: a text tower alone, read from Hugging Face's files and written so.

The peers are `transformers`' BERT models with random weights; the tower itself is held
to them in `bert_test.py`.
"""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unicl_jax import encoders, export
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights import MODEL, Weights, from_arrays, to_arrays
from unicl_jax.encoders.weights.files import read_arrays, write_arrays
from unicl_jax.errors import InputError
from unicl_jax.model import Model, load

HEADS = {"text": {"num_heads": 2}}  # 8 wide; released ones have 64 a head
MODELS = (
    "BertModel",
    "BertForPreTraining",
    "BertForSequenceClassification",
    "BertForQuestionAnswering",
)


@pytest.fixture(scope="module")
def make():
    """Makes a model of transformers', of one size, by its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others warn about while being imported
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")

    def make(name, **options):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=32,
            max_position_embeddings=8,
            hidden_size=16,
            num_attention_heads=2,
            num_hidden_layers=2,
            intermediate_size=40,
            attn_implementation="sdpa",  # the "eager" one has its softmax in float32
            **options,
        )
        model = getattr(transformers, name)(config).double().eval()
        for key, value in model.named_parameters():
            # Larger than those of a new model, and no bias 0: a wrong place would show.
            torch.nn.init.normal_(value, std=0.3)
            value.data += key.endswith("LayerNorm.weight")
        return model

    return make


def arrays_of(model):
    return {name: value.numpy() for name, value in model.state_dict().items()}


def tokens():
    """Rows of 2, 5 and 8 real tokens, then id 0."""
    rows = np.random.default_rng(1).integers(1, 32, (3, 8), dtype=np.int32)
    for row, end in zip(rows, (2, 5, 8), strict=True):
        row[end:] = 0
    return rows


def features_of(model):
    """Of `tokens()`, by a model of transformers'."""
    import torch

    ids = torch.tensor(tokens().astype(np.int64))
    with torch.no_grad():
        out = model.base_model(input_ids=ids, attention_mask=(ids != 0).long())
    return out.last_hidden_state[:, 0].numpy()


def run(found, dtype):
    options = {k: v for k, v in found.model["text"].items() if k != "name"}
    tower = encoders.bert(**options, dtype=dtype)
    return jax.jit(lambda params: tower.apply(params, {}, tokens())[0])(
        found.params["text"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_bert_gives_its_own_features_in_float64(name, make, x64):
    model = make(name)
    found = from_arrays(arrays_of(model), **HEADS)
    assert found.model == {
        "text": {
            "name": "bert",
            "vocab_size": 32,
            "context_length": 8,
            "width": 16,
            "num_heads": 2,
            "num_layers": 2,
            "hidden": 40,
        },
        "tokenizer": "WordPiece",
    }
    want = features_of(model)
    assert np.abs(want).max() > 0.5
    # Two float64 programs.
    np.testing.assert_allclose(run(found, jnp.float64), want, atol=1e-10)


def test_older_names_are_the_same_model(make):
    """Of norms, of the table that used to be saved, and of what is aside."""
    arrays = arrays_of(make("BertForPreTraining"))
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in arrays.items()
    }
    older["bert.embeddings.position_ids"] = np.arange(8)[None]
    assert len(older.keys() - arrays.keys()) == 2 * (1 + 2 * 2 + 1) + 1
    got, want = (from_arrays(x, **HEADS).params for x in (older, arrays))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_is_not_berts_is_not_passed_over(make):
    arrays = arrays_of(make("BertModel"))
    with pytest.raises(InputError, match=r"1 left over \(adapter.weight\)"):
        from_arrays({**arrays, "adapter.weight": np.zeros(3)})
    # RoBERTa has BERT's names, one row of types, and counts positions from another.
    roberta = {
        name: array[:1] if "token_type" in name else array
        for name, array in arrays.items()
    }
    with pytest.raises(InputError, match=r"token_type_embeddings.*\(1, 16\), not"):
        from_arrays(roberta)
    with pytest.raises(InputError, match="for a text tower alone; leave them out"):
        from_arrays(arrays, image={"image_size": 32})


def test_what_is_written_is_what_transformers_has(make):
    arrays = arrays_of(make("BertModel"))
    again = to_arrays(from_arrays(arrays, **HEADS), "hf_bert")
    assert arrays.keys() - again.keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    for name, array in again.items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)


@pytest.fixture
def folder(make, tmp_path):
    """As a hub has it, and the model in float32."""
    model = make("BertForPreTraining", layer_norm_eps=1e-3, pad_token_id=0).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", model


def test_a_folder_is_a_text_tower_to_use(folder):
    path, model = folder
    loaded = load(path)
    assert (loaded.image_size, loaded.embed_dim, loaded.logit_scale) == (None, 16, 1.0)
    assert loaded.config["text"]["num_heads"] == 2  # by its config.json
    want = features_of(model)
    got = loaded.encode_text(tokens(), normalize=False)
    # Two layers of float32's rounding on features of size 3.
    np.testing.assert_allclose(got, want, atol=5e-6)
    np.testing.assert_allclose(loaded.encode_text(tokens()), encoders.unit(want), 1e-4)
    # The file by itself doesn't say the heads.
    file = next(path.glob("*.safetensors"))
    assert load(file).config["text"]["num_heads"] == 1
    assert load(file, text={"num_heads": 2}).config["text"]["num_heads"] == 2


def test_a_text_tower_says_what_it_cannot_do(folder):
    loaded = load(folder[0])
    for texts in ("a cat", ["a cat"]):
        with pytest.raises(
            InputError, match=r"token ids \[B, L\] of its own.*WordPiece"
        ):
            loaded.encode_text(texts)
    for call in (loaded.preprocess, loaded.encode_image):
        with pytest.raises(InputError, match='this is a text tower alone \\("bert"\\)'):
            call(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match=r"in \[0, 32\): got 32"):
        loaded.encode_text(np.full((1, 3), 32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
    ],
)
def test_a_setting_that_is_not_the_towers_is_named(name, value, folder):
    path = folder[0] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(InputError, match=f"must have {name} .*got {json.dumps(value)}"):
        load(folder[0])


def test_a_model_with_berts_names_is_held_to_its_settings(folder):
    """ERNIE has the same arrays, and in its first version a relu."""
    path = folder[0] / "config.json"
    said = {**json.loads(path.read_text()), "model_type": "ernie"}
    path.write_text(json.dumps(said))
    assert load(folder[0]).config["text"]["num_heads"] == 2
    path.write_text(json.dumps({**said, "hidden_act": "relu"}))
    with pytest.raises(InputError, match='must have hidden_act "gelu".*got "relu"'):
        load(folder[0])


def test_a_trainers_text_tower_takes_what_is_read(folder):
    """At the trainer's own context_length, whose positions are the file's first."""
    path, model = folder
    found = weights.read(path, text={"context_length": 6})
    two = encoders.from_config(
        {
            **MODEL,
            "image": dict(
                name="vit",
                patch_size=4,
                width=24,
                num_layers=1,
                num_heads=3,
                image_size=8,
            ),
            "text": found.model["text"],
            "embed_dim": 4,
        }
    )
    params, state = jax.jit(two.init)(jax.random.key(0))
    shapes = jax.tree.map(np.shape, params["text"])
    assert jax.tree.map(np.shape, found.params["text"]) == shapes
    params = {**params, "text": found.params["text"]}
    got, _ = jax.jit(two.text_features)(params, state, tokens()[:2, :6])
    np.testing.assert_allclose(got, features_of(model)[:2], atol=5e-6)


# --- Export; no peer is needed.

SIZES = dict(vocab_size=600, context_length=6, width=16, num_heads=2, num_layers=1)
TEXT = {"name": "bert", "hidden": 24, "pad_id": 599, **SIZES}


@pytest.fixture(scope="module")
def both():
    """A two-tower model whose texts are a BERT's of our own tokenizer."""
    image = dict(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=32)
    model = {"image": {"name": "swin", **image}, "text": TEXT, "embed_dim": 8}
    two = encoders.from_config({**MODEL, **model})
    return Model(Weights(model, *jax.jit(two.init)(jax.random.key(0))))


def test_defaults_that_a_reader_would_not_guess_go_out(tmp_path, monkeypatch):
    sizes = dict(vocab_size=600, context_length=6, width=64, num_layers=1)
    image = dict(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=32)
    model = {
        "image": {"name": "swin", **image},
        "text": {"name": "transformer", **sizes},  # of 8 heads, not 64 channels each
        "embed_dim": 8,
    }
    two = encoders.from_config({**MODEL, **model})
    made = Model(Weights(model, *jax.jit(two.init)(jax.random.key(0))))
    monkeypatch.setattr(
        "unicl_jax.model.load", lambda source: made if source == "run" else load(source)
    )
    to = tmp_path / "model.safetensors"
    difference, untold, _ = export.export("run", to)
    assert difference == 0 and untold["text.num_heads"] == 8
    assert load(to).config["text"]["num_heads"] == 8


def test_a_text_tower_goes_out_by_itself_and_comes_back(both, tmp_path, monkeypatch):
    monkeypatch.setattr(  # as if it were a run
        "unicl_jax.model.load", lambda source: both if source == "run" else load(source)
    )
    to = tmp_path / "bert.safetensors"
    difference, untold, _ = export.export("run", to, "hf_bert")
    assert difference == 0 and untold == {"text.num_heads": 2, "text.pad_id": 599}
    again = load(to)
    assert again.config["text"] == TEXT and "image" not in again.config
    # Its ids were ours, so that strings are; another's file of its layout says not.
    features = again.encode_text("a", normalize=False)
    want, _ = encoders.one_tower("text", TEXT).apply(
        both.params["text"], both.state["text"], jnp.asarray(both.tokenize("a"))
    )
    np.testing.assert_allclose(features, want, atol=1e-6)
    assert export.export(to, tmp_path / "again.npz", "hf_bert")[0] == 0
    write_arrays(tmp_path / "theirs.npz", read_arrays(to)[0], {})
    with pytest.raises(InputError, match="WordPiece"):
        load(tmp_path / "theirs.npz").encode_text("a")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("unicl", 'for transformer: .*text tower is "bert"; .* that: hf_bert'),
        ("hf_clip", 'for vit: .*image tower is "swin"; .*: unicl, timm_swin'),
    ],
)
def test_other_formats_have_no_place_for_it(layout, words, both):
    with pytest.raises(InputError, match=words):
        to_arrays(Weights(both.config, both.params, both.state), layout)


def test_an_image_tower_alone_has_no_bert_to_write(both):
    only = {"image": both.config["image"]}
    image = Weights(only, {"image": both.params["image"]}, {"image": {}})
    with pytest.raises(InputError, match='for bert: the model\'s text tower is "none"'):
        to_arrays(image, "hf_bert")
