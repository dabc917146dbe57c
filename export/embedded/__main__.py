"""Export the embedded model into the package: `python -m latentrt.export.embedded`."""

from __future__ import annotations

import sys

from .. import export_checkpoint
from . import BUNDLE, CHECKPOINT

if __name__ == "__main__":
    export_checkpoint(CHECKPOINT, BUNDLE, replace=True)
    sys.stderr.write(f"{BUNDLE}\n")
