"""What retrieval found for some images and some texts, for a look."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from unicl_jax.evaluation.retrieval import Retrieval

EXAMPLES = 8  # of each direction, half of them found at once
SHOWN = 5  # candidates of each


def retrieval_examples(
    images: np.ndarray,
    texts: np.ndarray,
    owners: np.ndarray,
    captions: Sequence[str],
    scored: Retrieval,
    index: np.ndarray,
) -> tuple[dict[str, Any], list[int]]:
    """Queries with the best candidates of each.

    Args:
      images: [n, D] float32, unit rows.
      texts: [m, D] float32, unit rows.
      owners: [m] the image of each text.
      captions: m strings.
      scored: of the same arrays.
      index: [n] int64, each image's record.

    Returns:
      What a report reads, and the records whose pictures it shows.
    """
    found = {"image_to_text": [], "text_to_image": []}
    pictures = []
    for i in _chosen(scored.image_ranks):
        best, similarity = _best(images[i] @ texts.T)
        own = np.flatnonzero(owners == i)
        pictures.append(int(index[i]))
        found["image_to_text"].append(
            {
                "image": int(index[i]),
                "rank": int(scored.image_ranks[i]) + 1,
                "right": [captions[t] for t in own[:SHOWN]],
                "texts": [
                    {"text": captions[t], "score": s, "right": bool(owners[t] == i)}
                    for t, s in zip(best, similarity, strict=True)
                ],
            }
        )
    for t in _chosen(scored.text_ranks):
        best, similarity = _best(texts[t] @ images.T)
        pictures += [int(index[owners[t]]), *index[best].tolist()]
        found["text_to_image"].append(
            {
                "text": captions[t],
                "rank": int(scored.text_ranks[t]) + 1,
                "right": [int(index[owners[t]])],
                "images": [
                    {"image": int(index[i]), "score": s, "right": bool(owners[t] == i)}
                    for i, s in zip(best, similarity, strict=True)
                ],
            }
        )
    return found, pictures


def _chosen(ranks, seed=0):
    """Some that were found at once, and some that were not."""
    rng = np.random.default_rng(seed)
    first, later = (rng.permutation(np.flatnonzero(x)) for x in (ranks == 0, ranks > 0))
    half = max(EXAMPLES // 2, EXAMPLES - len(later))
    chosen = first[:half]
    return [*chosen.tolist(), *later[: EXAMPLES - len(chosen)].tolist()]


def _best(scores):
    order = np.argsort(-scores, kind="stable")[:SHOWN]
    return order, [float(s) for s in scores[order]]
