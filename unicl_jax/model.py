"""A trained model to use: pictures and texts in, unit embeddings out.

import unicl_jax
model = unicl_jax.load("runs/quickstart")
u = model.encode_image(model.preprocess(["cat.jpg"]))
v = model.encode_text(["a cat", "a dog"])
probabilities = jax.nn.softmax(model.logit_scale * u @ v.T)
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from unicl_jax import encoders, storage
from unicl_jax.augment import NORMALIZATIONS
from unicl_jax.augment import normalize as normalize_pixels
from unicl_jax.encoders import weights
from unicl_jax.encoders.weights import Weights
from unicl_jax.errors import InputError, choose, did_you_mean
from unicl_jax.pictures import square

# The crop's share of the shorter side, UniCL's and OpenAI's; 0: the whole is squashed.
CROP_PCT = {"imagenet": 224 / 256, "clip": 1.0}

TEXT_TOWER = {
    "name": "transformer",
    "vocab_size": 49408,
    "context_length": 77,
    "width": 512,
    "num_heads": 8,
    "num_layers": 12,
}


class Model:
    """The two towers with their weights, compiled on first use.

    Attributes:
      config: what it is: a config's `model` section, as a dict.
      params: of the towers.
      state: of the towers: batch norm's statistics, or empty dicts.
      image_size: pixels of a side of what `encode_image` takes; None without an image
        tower.
      embed_dim: D, width of the embeddings; of one tower alone, its features'.
      logit_scale: s, the multiplier of products of embeddings.
      texts_cut: how many texts so far were too long, and lost their tails.
      has_own_head: whether images are embedded by more than tower and projection.
      has_texts: whether it embeds texts, too.
      crop_pct: the centre crop's share of a picture's shorter side; 0: none is cut.
    """

    def __init__(self, found: Weights, encode_image=None, logit_scale=None):
        """Takes weights as `weights.from_arrays` or `load` make them.

        Args:
          found: the model and its weights.
          encode_image: (params, state, normalised images) -> unit embeddings, where
            the objective it was trained for has a way of its own; None: the towers'.
          logit_scale: s, where it is not the towers' own.
        """
        self.has_own_head, self.texts_cut = encode_image is not None, 0
        self.config = dict(found.model)
        self.params, self.state = jax.tree.map(jnp.asarray, found[1:])
        image = self.config.get("image")
        self.image_size = image.get("image_size", 224) if image else None
        normalization = self.config.get("normalization", "imagenet")
        crop_pct = 1.0
        if isinstance(normalization, str):
            crop_pct = CROP_PCT.get(normalization)
            choose(NORMALIZATIONS, normalization, "model.normalization")
        self._normalization = normalization
        self.crop_pct = self.config.get("crop_pct", crop_pct)
        self._text = None
        if "text" in self.config:
            self._text = encoders.options("text", self.config["text"])
        self.has_texts = self._text is not None
        if image is None or not self.has_texts:
            alone = "text" if image is None else "image"
            tower = encoders.one_tower(alone, self.config[alone])
            self.embed_dim, self.logit_scale = tower.width, 1.0

            def features(params, state, inputs):
                return tower.apply(params[alone], state[alone], inputs)[0]

            self._image = self._texts = jax.jit(features)
        else:
            two = encoders.from_config({**weights.MODEL, **self.config})
            self.embed_dim = self.config["embed_dim"]
            self.logit_scale = float(two.logit_scale(self.params))
            self._image = jax.jit(_projected(two.image_features, "image"))
            self._texts = jax.jit(_projected(two.text_features, "text"))
        if encode_image is not None:
            self._image = jax.jit(encode_image)
        if logit_scale is not None:
            self.logit_scale = logit_scale

    def encode_image(self, images, *, normalize: bool = True) -> jax.Array:
        """Embeds images.

        Args:
          images: [B, S, S, 3] uint8 (normalised here), or float normalised already; S
            is `image_size`. `preprocess` makes them from pictures. Floats in 0..1 look
            like normalised ones, and are taken for such.
          normalize: to unit L2 norm.

        Returns:
          [B, D] float32.

        Raises:
          InputError: if there is no image tower, shape or dtype don't fit, or floats
            that come from the host are not normalised.
        """
        self._needs_image_tower()
        size = self.image_size
        on_host = not isinstance(images, jax.Array)
        try:
            images = jnp.asarray(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"images must be an array [B, {size}, {size}, 3], uint8 or float "
                f"normalised: got {type(images).__name__}, which is none "
                f"({str(error).splitlines()[0][:80]}); model.preprocess makes one of "
                "paths and pictures."
            ) from error
        floating = jnp.issubdtype(images.dtype, jnp.floating)
        if images.shape[1:] != (size, size, 3) or not (
            floating or images.dtype == jnp.uint8
        ):
            raise InputError(
                f"images must be [B, {size}, {size}, 3], uint8 or float normalised: "
                f"got {images.shape} {images.dtype}; model.preprocess makes them so."
            )
        if not floating:
            images = normalize_pixels(images, self._normalization)
        # Of what is on a device already, looking would wait for all that is under way.
        elif on_host and np.abs(images).max(initial=0) > 4 * self._largest_pixel:
            raise InputError(
                "float images must be normalised, in about "
                f"{-self._largest_pixel:.1f} to {self._largest_pixel:.1f}: got values "
                f"of {np.abs(images).max():.4g}; pass pixels of 0..255 as uint8."
            )
        out = self._image(self.params, self.state, images.astype(jnp.float32))
        return encoders.unit(out) if normalize else out

    @functools.cached_property
    def _largest_pixel(self):
        """The largest value that a normalised pixel has."""
        ends = np.repeat(np.array([[[0]], [[255]]], np.uint8), 3, axis=2)
        return float(jnp.abs(normalize_pixels(ends, self._normalization)).max())

    def encode_text(self, texts, *, normalize: bool = True) -> jax.Array:
        """Embeds texts.

        Args:
          texts: a string, B strings, or integer tokens [B, L].
          normalize: to unit L2 norm.

        Returns:
          [B, D] float32.

        Raises:
          InputError: if there is no text tower, or the tokens don't fit it.
        """
        if self._text is None:
            raise InputError(
                "texts need a text tower that was taught: this is an image tower alone "
                f'("{self.config["image"]["name"]}"); load a model of both.'
            )
        from unicl_jax.data.text_length import cut

        texts = _listed(texts)
        if not len(texts):
            return jnp.zeros((0, self.embed_dim))
        tokens = self.tokenize(texts) if isinstance(texts, list) else texts
        length, vocab_size = self._text["context_length"], self._text["vocab_size"]
        if (
            tokens.ndim != 2
            or not np.issubdtype(tokens.dtype, np.integer)
            or not 0 < tokens.shape[1] <= length
        ):
            raise InputError(
                f"texts must be strings or integer tokens [B, L], L up to {length}: "
                f"got {tokens.dtype} {tokens.shape}; model.tokenize makes them."
            )
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            raise InputError(
                f"tokens must be in [0, {vocab_size}): got {tokens.min()} to "
                f"{tokens.max()}; model.tokenize makes them."
            )
        if self._text.get("causal", False):  # to which padding is nothing
            tokens = cut(tokens)
        out = self._texts(self.params, self.state, jnp.asarray(tokens, jnp.int32))
        return encoders.unit(out) if normalize else out

    @property
    def text_tower(self) -> dict[str, Any] | None:
        """Options of the text tower, defaults included; None without one."""
        return self._text

    def text_features(self, params: Any, state: Any, tokens: Any) -> jax.Array:
        """Embeds tokens that nothing is checked of, for work on many of them.

        Args:
          params: `params`, wherever they lie.
          state: `state`.
          tokens: [B, L] int32, or `encoders.packing.Packed` texts for a causal tower.

        Returns:
          [.., D] float32, not of unit norm.
        """
        return self._texts(params, state, tokens)

    def tokenize(self, texts: str | Sequence[str]) -> np.ndarray:
        """Texts to token ids.

        Rows are filled with end-of-text, or with the config's `text_padding`.

        Args:
          texts: one or B strings. What is too long is cut, its end-of-text kept, and
            counted in `texts_cut`.

        Returns:
          [B, context_length] int32.

        Raises:
          InputError: if there is no text tower, it has a tokenizer of its own, or a
            text is empty.
        """
        if self._text is None:
            raise InputError(
                "tokens need a text tower: this is an image tower alone; load a model "
                "of both."
            )
        tokenizer = self.config.get("tokenizer", "clip")
        if tokenizer != "clip":
            raise InputError(
                "texts for this model must be token ids [B, L] of its own tokenizer "
                f"({tokenizer}): got strings, for which there is CLIP's alone here; "
                "make the ids with the model's tokenizer and pass those."
            )
        alone = isinstance(texts, str) or not isinstance(texts, Iterable)
        texts = [texts] if alone else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(
                    f"texts must be strings: got {type(text).__name__} at index {i}; "
                    "leave it out, or make it one."
                )
        tokens = self._tokenizer(texts)
        # After cleaning, where "&nbsp;" and a byte order mark are empty, too.
        empty = np.flatnonzero(tokens[:, 1] == self._tokenizer.eot)
        if len(empty):
            raise InputError(
                f"texts must not be empty: got {texts[empty[0]]!r} at index "
                f"{empty[0]}; leave it out."
            )
        self.texts_cut += int(self._tokenizer.cut(texts, tokens).sum())
        padding = self.config.get("text_padding")
        if padding is not None:
            after = np.arange(tokens.shape[1]) > tokens.argmax(1)[:, None]
            tokens[after] = padding
        return tokens

    @functools.cached_property
    def _tokenizer(self):
        from unicl_jax.data.tokenizer import Tokenizer

        return Tokenizer(self._text["context_length"], self._text["vocab_size"])

    def preprocess(self, pictures) -> np.ndarray:
        """Pictures to the pixels that `encode_image` takes.

        The shorter side to S / crop_pct, bicubic, then the centre; or all of it, where
        crop_pct is 0. crop_pct is the config's, or 224 / 256 for UniCL's and ImageNet's
        models and 1 for CLIP's. As in training, a picture is as its file stores it:
        EXIF's orientation is not applied, and of frames the first is taken.

        Args:
          pictures: PIL images or paths, one or B.

        Returns:
          [B, S, S, 3] uint8.

        Raises:
          InputError: if there is no image tower, or a file is missing or is no picture.
        """
        self._needs_image_tower()
        if isinstance(pictures, str | Path) or not isinstance(pictures, Iterable):
            pictures = [pictures]
        size, pct = self.image_size, self.crop_pct
        shorter = int(size / pct) if pct else None
        pixels = [square(picture, size, shorter) for picture in pictures]
        return np.stack(pixels) if pixels else np.zeros((0, size, size, 3), np.uint8)

    def _needs_image_tower(self):
        if self.image_size is None:
            raise InputError(
                "images need an image tower: this is a text tower alone "
                f'("{self.config["text"]["name"]}"); load a model of both.'
            )


def _listed(texts):
    """A list of what should be texts, or an array of what should be tokens."""
    if isinstance(texts, str):
        return [texts]
    error = None
    if isinstance(texts, Iterable) and not isinstance(texts, bytes | Mapping):
        if not hasattr(texts, "__array__"):
            texts = list(texts)
            if any(isinstance(text, str) for text in texts):
                return texts
        try:
            array = np.asarray(texts)
            is_text = array.ndim == 1 and array.dtype.kind in "OU"
            return array.tolist() if is_text else array
        except (TypeError, ValueError, RuntimeError) as caught:  # ragged; on a GPU
            error = caught
    raise InputError(
        "texts must be strings, or integer tokens in an array [B, L]: got "
        f"{type(texts).__name__}; pass a list of strings, or a tokenizer's ids alone."
    ) from error


def _projected(features, tower):
    def encode(params, state, inputs):
        out, _ = features(params, state, inputs)
        return jnp.matmul(
            out, params[f"{tower}_projection"], precision=lax.Precision.HIGHEST
        )

    return encode


def load(
    source: str | Path, *, layout: str | None = None, seed: int = 0, **changes
) -> Model:
    """Loads a model to use.

    Args:
      source: a run's workdir; a weights file (`.safetensors`, `.npz`, `.pth`, `.pt`,
        `.bin`) in a layout of `encoders.weights.LAYOUTS`; a folder as hubs have it,
        Hugging Face's (`config.json`, `model.safetensors`) or open_clip's
        (`open_clip_config.json`, `open_clip_model.safetensors`); or a name in
        `variants()`, for random weights.
      layout: of a file, if its names should not tell.
      seed: of random weights.
      **changes: options that a file's shapes don't tell, as `text={"num_heads": 4}`;
        other sizes, to which a file's learned positions are resized, as
        `image={"image_size": 384, "window_size": 12}`; or options of a name's model. A
        run says all of its own.

    Returns:
      The model; of a file of one tower, without texts or without images.

    Raises:
      InputError: if there is no such thing, it is not whole, or sizes don't fit.
    """
    if not isinstance(source, str | Path):
        raise InputError(
            "a model must be a path or a name: got "
            f"{type(source).__name__}; arrays by name go to weights.from_arrays."
        )
    path = storage.path(source)
    storage.check_bucket(path)
    try:
        there = path.exists()
    except OSError as error:  # too long, or not to be looked at
        raise InputError(
            f'a model must be a path that can be read, or a name: "{source}" gave '
            f"{error.strerror}; name another."
        ) from error
    if path.is_dir():
        if (path / "checkpoints").is_dir():
            if changes or layout:
                raise InputError(
                    "a run's model must be as it was trained: got "
                    f"{', '.join([*changes, *['layout'] * bool(layout)])} for "
                    f'"{source}"; leave those out.'
                )
            return _of_run(path)
    if storage.is_bucket(path):
        raise InputError(
            f'in Cloud Storage a model must be the workdir of a run: "{source}" holds '
            "no checkpoints; copy weights to this machine."
        )
    if there:
        return Model(weights.read(path, layout, **changes))
    known = variants()
    if str(source) not in known:
        raise InputError(
            f'a model must be a workdir, a weights file or a name: "{source}" is no '
            f"file or folder; {did_you_mean(str(source), known)}"
        )
    weights.check_changes(changes)
    model = weights.merged(known[str(source)], changes)
    two = encoders.from_config({**weights.MODEL, **model})
    return Model(Weights(model, *jax.jit(two.init)(jax.random.key(seed))))


def is_random(source: str | Path) -> bool:
    """Whether `load` makes random weights, since a name is all there is.

    Args:
      source: as for `load`.

    Returns:
      True for a name in `variants()` where no such file or folder is.
    """
    return str(source) in variants() and not storage.path(source).exists()


def variants() -> dict[str, dict[str, Any]]:
    """The models that have a name: a config's `model` section for each."""
    found = {}
    for name in encoders.IMAGE_TOWERS:
        if name in encoders.UNNAMED:
            continue
        text, embed_dim = dict(TEXT_TOWER), 512
        image = {"name": name, "image_size": 224}
        found[name] = {"image": image, "text": text, "embed_dim": embed_dim}
        if name.startswith("vit_"):
            wide = {"width": 768, "num_heads": 12} if name.startswith("vit_l") else {}
            text |= {"eps": 1e-5, **wide}
            found[name] |= {
                "embed_dim": text["width"],
                "normalization": "clip",
                "logit_scale_init": 2.659,
            }
        if name.startswith("klite_"):  # as of files: `encoders.weights.unicl`
            text["causal"] = False
            found[name]["text_padding"] = 0
    return found


def _of_run(workdir: Path) -> Model:
    """The newest checkpoint of a run, evaluated as the run evaluates it."""
    from unicl_jax import checkpoint, objectives

    try:
        config = json.loads((workdir / "config.json").read_text())
        model, objective = config["model"], config["objective"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'a workdir must hold the config.json of its run: "{workdir}" does not '
            f"({error})."
        ) from error
    params, state = checkpoint.read_towers(workdir)
    two = encoders.from_config(model)
    made = objectives.make_objective(objective, two)
    model = {**model, **_picture(config)}
    if "text" in made.unused:  # its text tower says nothing: leave it out
        del model["text"]
        return Model(Weights(model, params, state))
    scale = None
    if made.logit_scale is not None:
        scale = float(made.logit_scale(params))
    return Model(Weights(model, params, state), made.encode_image, scale)


def _picture(config) -> dict[str, float]:
    """How a run's pictures become squares, by its first evaluation or source."""
    sources = [*config["evaluations"].values(), *config["data"]["sources"].values()]
    sources = [source for source in sources if source.get("format")]
    name = (sources[0].get("preprocess") or {}).get("name")
    whole = sources[0]["format"] in ("npz", "quickstart") or name == "resize"
    return {"crop_pct": 0.0} if whole else {}
