"""Image-text retrieval: R@1/5/10 both ways, exact, in tiles of the similarity matrix.

A query's rank is the number of wrong candidates whose score is that of its best true
match or more: nothing is sorted, and no row of the matrix is kept. One product of a
tile serves both directions.

Exact means: as real arithmetic has it. Float32 products of the same two rows differ in
their last bits with the tile that they stand in, so they can tell that a candidate is
above a score only outside a band around it, as wide as their error can be. Each query
gets two counts, without the band and with it; where the two leave open what a metric
is, the query alone is counted again in float64. Results don't depend on blocks,
devices or hardware.

Letters: n images, m texts, D width, R rows of a block, C texts of a tile.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from unicl_jax import sharding
from unicl_jax.errors import InputError

AT = (1, 5, 10)
ROWS, TEXTS = 1024, 8192  # of a tile; at most 2^15 - 1, as two counts share an int32
RECOUNTED = 512  # queries counted again at a time
TIE = 1e-12  # in float64, whose own error is below 1e-13


class Retrieval(NamedTuple):
    """How well images find their texts, and texts their images."""

    # `image_to_text_r1`, ... in [0, 1], and `image_to_text_median_rank`, at least 1;
    # the same of `text_to_image`.
    metrics: dict[str, float]
    # Wrong candidates at or above the best true match: [n] and [m] int64. Exact below
    # the largest k and around the median; elsewhere at most short by near ties, whose
    # scores float32 cannot tell apart.
    image_ranks: np.ndarray
    text_ranks: np.ndarray


def retrieval(
    image_features: np.ndarray,
    text_features: np.ndarray,
    image_of_text: np.ndarray,
    *,
    at: Sequence[int] = AT,
    mesh: Mesh | None = None,
    rows: int = ROWS,
    texts: int = TEXTS,
    between: Callable[[], None] = lambda: None,
) -> Retrieval:
    """Scores retrieval by cosine similarity, in both directions.

    rank(i) = #{j wrong: <u_i, v_j> >= max over true t of <u_i, v_t>},
    R@k = mean over queries of [rank < k]

    An image is found by any of its texts; a text has one image. A tie counts against
    the model, whichever comes first: features that are all the same find nothing.

    Args:
      image_features: [n, D] float, unit rows.
      text_features: [m, D] float, unit rows.
      image_of_text: [m] integers in [0, n), each image there at least once.
      at: the k of R@k.
      mesh: the devices, over which images are divided; None: all of them.
      rows: images of a tile on each device. Only speed and memory depend on it.
      texts: of a tile.
      between: called after every tile; what it raises ends the evaluation.

    Returns:
      Metrics and ranks, the same on every process.

    Raises:
      InputError: if arrays don't fit, hold what is not finite or no unit rows, an index
        is out of range, or an image has no text.

    Source: Karpathy and Fei-Fei, CVPR 2015, arXiv 1412.2306, section 4.1, for the
      metrics; public code sorts, and leaves ties to the order of the data.
    """
    images, captions, owners = _checked(image_features, text_features, image_of_text)
    at = _checked_sizes(at, rows, texts)
    mesh = sharding.make_mesh() if mesh is None else mesh
    of_text, of_image = _best_true(images, captions, owners)
    image_counts, text_counts = _count(
        (images, of_image), (captions, of_text, owners), mesh, rows, texts, between
    )
    ids = np.arange(len(images), dtype=np.int32)
    ranks = {
        "image_to_text": _ranks(
            image_counts, at, (images, ids, of_image), (captions, owners), between
        ),
        "text_to_image": _ranks(
            text_counts, at, (captions, owners, of_text), (images, ids), between
        ),
    }
    metrics = {}
    for way, found in ranks.items():
        for k in at:
            metrics[f"{way}_r{k}"] = float((found < k).mean())
        metrics[f"{way}_median_rank"] = float(np.median(found) + 1)
    return Retrieval(metrics, *ranks.values())


def _best_true(images, captions, owners):
    """In float64, each text's score with its image, and each image's best of those."""
    of_text = np.empty(len(captions))
    for i in range(0, len(captions), 4096):
        part = slice(i, i + 4096)
        u = images[owners[part]].astype(np.float64)
        of_text[part] = np.einsum("nd,nd->n", u, captions[part].astype(np.float64))
    of_image = np.full(len(images), -np.inf)
    np.maximum.at(of_image, owners, of_text)
    return of_text, of_image


def _count(of_images, of_texts, mesh, rows, texts, between):
    """Counts of wrong candidates surely above, and perhaps: [n, 2] and [m, 2]."""
    (images, best), (captions, true, owners) = of_images, of_texts
    n, m = len(images), len(captions)
    shards = math.prod(mesh.shape[axis] for axis in sharding.batch_axes(mesh))
    rows, texts = _even(-(-n // shards), rows), _even(m, texts)
    padded = -(-n // (rows * shards)) * rows * shards
    over, whole = sharding.over_batch(mesh), sharding.replicated(mesh)
    # A row of NaN is above and below nothing: padding counts nowhere.
    on_device = (
        _padded(images, padded, np.nan),
        _padded(best.astype(np.float32), padded, 0),
        np.arange(padded, dtype=np.int32),
    )
    on_device = _put(on_device, over)
    image_counts = _put(np.zeros((padded, 2), np.int32), over)
    text_counts = np.empty((m, 2), np.int32)
    tile = _tile(mesh, rows)
    for start in range(0, m, texts):
        part = slice(start, start + texts)
        given = (
            _padded(captions[part], texts, np.nan),
            _padded(true[part].astype(np.float32), texts, 0),
            _padded(owners[part], texts, 0),
        )
        given = _put(given, whole)
        image_counts, of_tile = tile(image_counts, on_device, given)
        text_counts[part] = np.asarray(of_tile)[: m - start]
        between()
    everywhere = jax.jit(lambda x: x, out_shardings=whole)(image_counts)
    return np.asarray(everywhere)[:n], text_counts


@functools.lru_cache(maxsize=8)
def _tile(mesh, rows):
    """Compiled counts of a tile of texts against all images, in blocks of rows."""
    axes = sharding.batch_axes(mesh)

    def local(image_counts, images, texts):
        captions, of_text, owners = texts
        # Each of D products and D sums of float32 is off by 2^-24 of its size at most,
        # and unit rows' products add up to 1 at most: here, twice that.
        error = jnp.float32((captions.shape[1] + 8) * 2.0**-23)

        def block(text_counts, part):
            u, of_image, ids = part
            scores = lax.dot_general(
                u, captions, (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
            )
            own = ids[:, None] == owners[None, :]
            scores = jnp.where(own, jnp.nan, scores)

            def counts(best, axis):
                surely = (scores > best + error).astype(jnp.int32)
                perhaps = (scores >= best - error).astype(jnp.int32)
                both = (surely + (perhaps << 16)).sum(axis)  # one pass for the two
                return jnp.stack([both & 0xFFFF, both >> 16], -1)

            text_counts += counts(of_text[None, :], 0)
            return text_counts, counts(of_image[:, None], 1)

        blocks = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), images)
        none = lax.pcast(jnp.zeros((len(owners), 2), jnp.int32), axes, to="varying")
        text_counts, found = lax.scan(block, none, blocks)
        return image_counts + found.reshape(-1, 2), lax.psum(text_counts, axes)

    over, whole = PartitionSpec(axes), PartitionSpec()
    specs = dict(in_specs=(over, over, whole), out_specs=(over, whole))
    return jax.jit(jax.shard_map(local, mesh=mesh, **specs), donate_argnums=0)


def _ranks(counts, at, queries, candidates, between):
    """The counts, exact wherever a metric depends on it."""
    least, most = counts.astype(np.int64).T
    # The median lies between those of the two counts.
    low = np.sort(least)[(len(least) - 1) // 2]
    high = np.sort(most)[len(most) // 2]
    matters = (least < max(at)) | ((least <= high) & (most >= low))
    again = np.flatnonzero(matters & (least < most))
    queries = [x[again] for x in queries]
    least[again] = _recounted(*queries, *candidates, between)
    return least


def _recounted(queries, of_query, best, candidates, of_candidate, between):
    """Ranks of some queries in float64."""
    ranks = np.zeros(len(queries), np.int64)
    for i in range(0, len(candidates) * bool(len(queries)), TEXTS):
        v, owner = (
            candidates[i : i + TEXTS].astype(np.float64),
            of_candidate[i:][:TEXTS],
        )
        for j in range(0, len(queries), RECOUNTED):
            part = slice(j, j + RECOUNTED)
            scores = queries[part].astype(np.float64) @ v.T
            above = scores >= (best[part] - TIE)[:, None]
            above &= of_query[part, None] != owner[None, :]
            ranks[part] += above.sum(1)
            between()
    return ranks


def _even(count, most):
    """The size of as few parts as there must be, of which the last is as full."""
    parts = -(-count // most)
    return -(-count // parts)


def _put(arrays, to):
    """Host arrays that every process has, on the devices of all."""
    # `jax.device_put` would compare them over processes, and NaN is not itself.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, to, x.__getitem__), arrays
    )


def _padded(x, size, value):
    """Rows of `value` behind those of x."""
    if len(x) == size:
        return x
    rest = np.full((size - len(x), *x.shape[1:]), value, x.dtype)
    return np.concatenate([x, rest])


def _checked_sizes(at, rows, texts):
    at = tuple(at)
    for what, value in [*(("each k", k) for k in at), ("rows", rows), ("texts", texts)]:
        if type(value) is not int or not 1 <= value < 2**15:
            raise InputError(
                f"{what} must be a whole number in [1, 32767]: got {value!r}."
            )
    return at


def _checked(image_features, text_features, image_of_text):
    """The arrays as float32 and int32."""
    arrays = []
    for what, x in (("image", image_features), ("text", text_features)):
        x = np.asarray(x)
        if x.ndim != 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
            raise InputError(
                f"{what}_features must be floats [rows, D], at least one: got "
                f"{x.dtype} {x.shape}."
            )
        x = np.ascontiguousarray(x, np.float32)
        squares = np.einsum("nd,nd->n", x, x)
        if not np.isfinite(squares).all():
            row = np.flatnonzero(~np.isfinite(squares))[0]
            raise InputError(
                f"{what}_features must be finite: got NaN or infinity in row {row}; "
                "look for what made them so."
            )
        if np.abs(squares - 1).max() > 1e-2:
            row = np.abs(squares - 1).argmax()
            raise InputError(
                f"{what}_features must be unit rows: got one of norm "
                f"{squares[row] ** 0.5:.4g} in row {row}; divide each by its norm."
            )
        arrays.append(x)
    images, captions = arrays
    if images.shape[1] != captions.shape[1]:
        raise InputError(
            "image_features and text_features must be of one width: got "
            f"{images.shape[1]} and {captions.shape[1]}."
        )
    owners = np.asarray(image_of_text)
    if owners.shape != (len(captions),) or not np.issubdtype(owners.dtype, np.integer):
        raise InputError(
            f"image_of_text must be {len(captions)} integers, one a text: got "
            f"{owners.dtype} {owners.shape}."
        )
    if owners.min() < 0 or owners.max() >= len(images):
        row = np.flatnonzero((owners < 0) | (owners >= len(images)))[0]
        raise InputError(
            f"image_of_text must be in [0, {len(images)}), the images: got "
            f"{owners[row]} for text {row}."
        )
    counts = np.bincount(owners, minlength=len(images))
    if not counts.all():
        row = np.flatnonzero(counts == 0)[0]
        raise InputError(
            f"every image must have a text: got none for {(counts == 0).sum()} of "
            f"{len(images)}, as image {row}; leave those images out."
        )
    return images, captions, owners.astype(np.int32)
