"""`python -m undo_ray`: the command line."""

import sys

from undo_ray.cli import main

sys.exit(main())
