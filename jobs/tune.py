"""The search as a Ray job: ray job submit --working-dir . -- python jobs/tune.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
