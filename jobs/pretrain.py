"""Pretraining as a Ray job: ray job submit --working-dir . -- python jobs/pretrain.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
