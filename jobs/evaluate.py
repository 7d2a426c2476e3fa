"""`undo-ray evaluate` as a job: `ray job submit --working-dir . -- python jobs/evaluate.py RECIPE [the same flags]`."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from undo_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
