"""Fine-tuning as a Ray job: ray job submit --working-dir . -- python jobs/finetune.py CONFIG --run.folder SHARED ..."""

import sys

from slidr.cli import entry_point

if __name__ == "__main__":
    entry_point(["finetune", *sys.argv[1:]])
