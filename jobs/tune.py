"""The search as a Ray job: ray job submit --working-dir . -- python jobs/tune.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import entry_point

if __name__ == "__main__":
    entry_point(["tune", *sys.argv[1:]])
