"""How fast a model is judged, in parts: `python -m benchmarks.evaluation PART`.

python -m benchmarks.evaluation probe
python -m benchmarks.evaluation retrieval
python -m benchmarks.evaluation classifier
python -m benchmarks.evaluation probe --markdown

`benchmarks/README.md` says what each part measures.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import (
    evaluation_classifier,
    evaluation_probe,
    evaluation_retrieval,
    harness,
)

# Each has add_options(parser), measure(options), title(found) and rows_of(found).
PARTS = {
    "probe": evaluation_probe,
    "retrieval": evaluation_retrieval,
    "classifier": evaluation_classifier,
}


def main(argv):
    """Runs a part, prints its table and writes JSON; or prints what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        one = parts.add_parser(name, help=part.__doc__.split("\n")[0])
        part.add_options(one)
        one.add_argument("--out", type=Path, help="JSON; default in benchmarks/results")
        one.add_argument("--markdown", action="store_true", help="print all results")
    options = parser.parse_args(argv)
    part = PARTS[options.part]
    prefix = f"evaluation_{options.part}"
    harness.report(prefix, options, part.measure, part.title, part.rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
