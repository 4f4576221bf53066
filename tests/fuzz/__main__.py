"""PYTHONPATH=.:tests python -m fuzz INPUT MUTATION SEED repeats one case."""

import sys

from .sandbox import main

sys.exit(main("fuzz.inputs", sys.argv[1:]))
