"""How a run scales over chips, in parts: `python -m benchmarks.scaling PART`.

python -m benchmarks.scaling compiled --keep=programs
python -m benchmarks.scaling compiled --markdown

`benchmarks/README.md` says what each part measures.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import harness, scaling_compiled, scaling_virtual

# Each has add_options(parser), measure(options), title(found) and rows_of(found).
PARTS = {"virtual": scaling_virtual, "compiled": scaling_compiled}


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
    prefix = f"scaling_{options.part}"
    harness.report(prefix, options, part.measure, part.title, part.rows_of)


if __name__ == "__main__":
    main(sys.argv[1:])
