"""How a benchmark tells what it found over its runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path


def tell(found: Mapping[str, Sequence[float]], file: Path | None) -> None:
    """Print a table of median, lowest and highest; the medians go to `file` as JSON, one number a key."""
    medians = {key: statistics.median(values) for key, values in found.items()}
    print("| | median | lowest | highest |\n|---|---|---|---|")
    for key, values in found.items():
        print(f"| {key} | {medians[key]:.3g} | {min(values):.3g} | {max(values):.3g} |")
    if file:
        file.write_text(json.dumps(medians, indent=2) + "\n")
