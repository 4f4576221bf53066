"""What `ray job submit` runs for superpixels: python jobs/superpixels.py CONFIG --superpixels.folder SHARED ..."""

import sys

from slidr.cli import main

if __name__ == "__main__":
    sys.exit(main(["superpixels", *sys.argv[1:]]))
