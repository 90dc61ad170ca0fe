"""Where a run starts from: other runs' models, and weights files of any layout."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from unicl_jax import checkpoint, encoders, objectives, storage
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights.resize import SIZES, resized
from unicl_jax.errors import InputError
from unicl_jax.evaluation import classifier
from unicl_jax.evaluation.encoders import Encoders
from unicl_jax.step import TrainState
from unicl_jax.workdir import saved_config

# Options of towers that arrays don't show: where a reader guesses, the config's count.
GUESSED = ("num_heads", "activation")


class Start(NamedTuple):
    """One of the things that a run starts from.

    Attributes:
      source: its path.
      parts: of the model, by name, that are taken from it.
      params: of a weights file, those parts on the host; None: a run, read later.
      state: the same.
    """

    source: str
    parts: tuple[str, ...]
    params: Any = None
    state: Any = None


def read(config: Mapping[str, Any], model: encoders.TwoTower) -> list[Start]:
    """Looks at what `init_from` names; weights files are read and held to the model.

    Args:
      config: the whole config: `init_from` (paths with commas between them, or None),
        `model`, `objective`, `frozen`.
      model: that `config.model` describes.

    Returns:
      What to start from, in the config's order; where several have a part, the last
      one's counts.

    Raises:
      InputError: if there is no such run or file, it is of another model, or a tower
        is frozen that none of them has.
    """
    like = jax.eval_shape(model.init, jax.random.key(0))
    sources = [source.strip() for source in (config["init_from"] or "").split(",")]
    starts = [_start(source, config, like) for source in sources if source]
    taken = {part for start in starts for part in start.parts}
    if starts:
        _check_frozen(config, taken)
    if config.get("classes_from_prompts", False) and "text" not in taken:
        raise InputError(
            "classes_from_prompts needs a text tower that learnt: "
            f'"{config["init_from"]}" has none; name another source in init_from, or '
            "start classes at random: --config.classes_from_prompts=False."
        )
    return starts


def apply(start: Start, state: TrainState) -> tuple[TrainState, str]:
    """Puts what a run starts from into its first state.

    Args:
      start: as `read` gives it.
      state: some of whose model's parameters are replaced; its objective's own, its
        optimizer and its step stay.

    Returns:
      The state, and a line that says what was taken from where.

    Raises:
      InputError: if a run's checkpoint is not whole, or its model is another one.
    """
    if start.params is None:
        state, step = checkpoint.load_towers(start.source, state, start.parts)
        return state, f"{', '.join(start.parts)} from step {step} of {start.source}"

    def replaced(trees, new):
        old = {name: trees[name] for name in new}
        return {**trees, **jax.tree.map(_put, new, old)}

    params = replaced(state.params, start.params)
    model_state = replaced(state.model_state, start.state)
    state = state._replace(params=params, model_state=model_state)
    return state, f"{', '.join(start.parts)} from {start.source}"


def classes_from_prompts(
    state: TrainState,
    names: Sequence[str],
    templates: Sequence[str],
    tokenize: Callable[[Sequence[str]], np.ndarray],
    encoders: Encoders,
) -> tuple[TrainState, str]:
    """Starts an objective's vectors for concepts as their prompts' embeddings.

    Args:
      state: whose objective is one of `objectives.BY_VECTORS`.
      names: of the concepts.
      templates: of the prompts.
      tokenize: texts -> [n, L] int32.
      encoders: of the model.

    Returns:
      The state, and a line that says so.
    """
    vectors = classifier.class_embeddings(
        *(encoders.text, state.params, state.model_state),
        classifier.make_prompts(names, templates, tokenize),
        *(encoders.mesh, encoders.text_tower),
    )
    own = state.params["objective"]
    own = {**own, "label_embedding": _put(vectors, own["label_embedding"])}
    state = state._replace(params={**state.params, "objective": own})
    return state, f"{len(names)} classes from {len(templates)} prompts each"


def _put(array, like):
    # By parts: on several processes no device has to hold what it does not own.
    array = np.asarray(array, like.dtype)
    return jax.make_array_from_callback(
        like.shape, like.sharding, lambda index: array[index]
    )


def _check_frozen(config, taken):
    """A tower that neither learnt before nor learns now says nothing."""
    for tower in objectives.taught_by_both(config["objective"], ""):
        if tower in SIZES and tower in config["frozen"] and tower not in taken:
            raise InputError(
                f'init_from must hold what is frozen: "{config["init_from"]}" has no '
                f"{tower} tower that learnt; name another source, or leave {tower} out "
                "of frozen."
            )


def _start(source, config, like):
    path = storage.path(source)
    if not storage.is_bucket(path) and (
        path.is_file() or path.is_dir() and not (path / "checkpoints").is_dir()
    ):
        return _of_weights(source, config, like)
    checkpoint.check_has_saved(source)
    theirs = saved_config(source)
    parts = objectives.taught_by_both(
        config["objective"],
        theirs.get("objective"),
        config.get("classes_from_prompts", False),
    )
    _check_options(source, theirs.get("model", {}), config["model"], parts)
    return Start(source, parts)


def _of_weights(source, config, like):
    (found, told), here = weights.read_and_told(source), config["model"]
    taught = objectives.taught_by_both(
        config["objective"], "", config.get("classes_from_prompts", False)
    )
    parts = tuple(part for part in taught if part in found.params)
    guessed = {
        f"{tower}.{name}"
        for tower in SIZES
        for name in GUESSED
        if name in here[tower] and name not in told.get(tower, {})
    }
    _check_options(source, found.model, here, parts, guessed)
    towers = [tower for tower in SIZES if tower in parts]
    # Of the sizes that the file has: positions are resized below.
    native = weights.merged(
        here,
        {
            tower: {k: v for k, v in found.model[tower].items() if k in SIZES[tower]}
            for tower in towers
        },
    )
    params, state, there, its_state, wanted = (
        {k: tree[k] for k in parts if k in tree}
        for tree in (*found[1:], *weights.shapes(native), like[0])
    )
    if differ := checkpoint.differences((params, state), (there, its_state)):
        raise InputError(
            f'init_from must be of this model: {len(differ)} arrays of "{source}" '
            f"differ, as {'; '.join(differ[:2])}. Set config.model as there, or name "
            "other weights."
        )
    return Start(source, parts, resized(params, wanted), state)


def _check_options(source, there, here, parts, guessed=()):
    """Refuses what makes of equal shapes another model, in the towers that are taken.

    Of the sizes, arrays' shapes say what differs; those in `guessed` don't count.
    """
    there = {name: x for name, x in there.items() if name in parts or name not in SIZES}
    skipped = {f"{tower}.{name}" for tower in SIZES for name in SIZES[tower]}
    differ = [
        f"{name} {theirs}, here it is {ours}"
        for name, theirs, ours in weights.different_options(there, here)
        if name not in skipped | {*guessed}
    ]
    normalization = there.get("normalization", "imagenet")
    if "image" in there and normalization != here["normalization"]:
        differ.append(
            f"normalization {normalization}, here it is {here['normalization']}"
        )
    if "text" in there and there.get("tokenizer", "clip") != "clip":
        differ.append(f"its own tokenizer ({there['tokenizer']}), and training CLIP's")
    if differ:
        raise InputError(
            f'init_from must be of this model: "{source}" has {"; ".join(differ)}. Set '
            "config.model as there, or name another source."
        )
