"""Evaluation as a Ray job: ray job submit --working-dir . -- python jobs/evaluate.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import entry_point

if __name__ == "__main__":
    entry_point(["evaluate", *sys.argv[1:]])
