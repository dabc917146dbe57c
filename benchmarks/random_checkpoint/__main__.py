"""`python -m latentrt.benchmarks.random_checkpoint ARCHITECTURE OUT`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from ...engines.errors import RequestError
from . import ARCHITECTURES, __doc__, write_random_checkpoint
from .weights import DTYPES

parser = ArgumentParser(description=__doc__)
parser.add_argument("architecture", choices=list(ARCHITECTURES))
parser.add_argument("out", type=Path)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--precision", choices=list(DTYPES), help="by default what the architecture is published in")
parser.add_argument("--networks", nargs="*", help="folders whose weights are written, by default all")
given = parser.parse_args()
try:
    write_random_checkpoint(
        given.architecture, given.out, seed=given.seed, precision=given.precision, networks=given.networks
    )
except RequestError as error:
    parser.error(str(error))
