"""`undo-ray serve` as a job: `ray job submit --working-dir . -- python jobs/serve.py RUN [the same flags]`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from undo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
