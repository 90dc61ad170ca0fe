"""Writes the quick start's emoji as a user's own files would lie, for configs/own_data.

python benchmarks/own_data.py FOLDER

FOLDER/pictures and FOLDER/held_out get PNG files in one folder a subgroup; three
vendors drew the first, Twemoji the others. FOLDER/captions.csv has the captions of the
pictures, up to eight rows each.
"""

import csv
import re
import sys
from pathlib import Path

from PIL import Image

from unicl_jax.data import quickstart


def main(folder: Path):
    labels, subgroups = quickstart.emoji_subgroups()
    names, captions = quickstart.emoji_names(), quickstart.emoji_captions()
    rows = []
    for vendor in (*quickstart.TRAIN_VENDORS, quickstart.TEST_VENDOR):
        is_train = vendor != quickstart.TEST_VENDOR
        top = "pictures" if is_train else "held_out"
        for pixels, emoji in zip(*quickstart.emoji(vendor), strict=True):
            stem = re.sub(r"\W+", "_", names[emoji])
            path = Path(top, subgroups[labels[emoji]].replace(" ", "_"))
            path /= f"{stem}_{emoji}_{vendor}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / path)
            if is_train:
                rows += [(path, caption) for caption in dict.fromkeys(captions[emoji])]
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("filepath", "caption"), *rows])


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
