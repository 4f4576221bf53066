"""What `ray job submit` runs for superpixels: python jobs/superpixels.py CONFIG --superpixels.folder SHARED ..."""

import sys

from slidr.cli import entry_point

if __name__ == "__main__":
    entry_point(["superpixels", *sys.argv[1:]])
