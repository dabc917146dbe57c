"""`python -m latentrt.runtime.cli`."""

from . import main

main()
