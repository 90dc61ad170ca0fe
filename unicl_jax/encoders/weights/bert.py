"""BERT's weights in Hugging Face's names: a text tower alone.

Source: transformers, modeling_bert.py; the names before 2019 from its conversion code.
"""

from unicl_jax.encoders.weights.layout import Layout, linear, rename, same
from unicl_jax.encoders.weights.unicl import LEAVES, count

# A model with a head on top has BERT's arrays under "bert."; norms were once a TF
# user's.
_OLDER = (
    (r"^bert\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
# What a file of BERT's may hold beside the tower: a pooler and a task's head, which our
# features come before, and a table that is computed.
_ASIDE = {
    "embeddings.position_ids",
    "cls.predictions.bias",
    *(
        f"{name}.{leaf}"
        for name in (
            "pooler.dense",
            "cls.predictions.transform.dense",
            "cls.predictions.transform.LayerNorm",
            "cls.predictions.decoder",
            "cls.seq_relationship",
            "classifier",
            "qa_outputs",
        )
        for leaf in ("weight", "bias")
    ),
}
_WORDS = "embeddings.word_embeddings.weight"
_LAYER = "encoder.layer.0."
_NAMES = (
    (r"^text/", ""),
    (r"^encoder_layer_(\d+)/", r"encoder.layer.\1."),
    (r"(query|key|value)/", r"attention.self.\1/"),
    (r"attention_output/", "attention.output.dense/"),
    (r"attention_norm/", "attention.output.LayerNorm/"),
    (r"\.(intermediate|output)/", r".\1.dense/"),
    (r"output_norm/", "output.LayerNorm/"),
    *LEAVES,
)


def _canonical(arrays):
    found = {rename(name, _OLDER): array for name, array in arrays.items()}
    return {name: array for name, array in found.items() if name not in _ASIDE}


def _model(arrays):
    vocab_size, width = arrays[_WORDS].shape
    return {
        "text": {
            "name": "bert",
            "vocab_size": vocab_size,
            "context_length": arrays["embeddings.position_embeddings.weight"].shape[0],
            "width": width,
            "num_heads": max(1, width // 64),  # as in every release
            "num_layers": count(arrays, r"^encoder\.layer\.(\d+)\."),
            "hidden": arrays[f"{_LAYER}intermediate.dense.weight"].shape[0],
        },
        "tokenizer": "WordPiece",
    }


def _part(path, axes):
    del axes
    if not path.startswith("text/"):
        return None
    name = rename(path, _NAMES)
    return linear(name) if path.endswith("/kernel") else same(name)


def _matches(names):
    names = {rename(name, _OLDER) for name in names}
    return {_WORDS, f"{_LAYER}attention.self.query.weight"} <= names


BERT = Layout("hf_bert", _matches, _canonical, _model, _part)
