"""Evaluation as a Ray job: ray job submit --working-dir . -- python jobs/evaluate.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
