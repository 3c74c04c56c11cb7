"""What ranks tell the command: why they do not begin, and what they measured. Files in a folder of the run's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REFUSED = "refused"


def refuse(scratch: Path, error: Exception) -> None:
    """Say why nothing is run. All ranks say the same, or one of them."""
    new = scratch / f"{REFUSED}.{os.getpid()}"
    new.write_text(str(error))
    new.replace(scratch / REFUSED)


def tell(scratch: Path, rank: int, facts: dict[str, Any]) -> None:
    """Leave what a rank measured."""
    (scratch / f"facts-{rank}.json").write_text(json.dumps(facts))


def heard(scratch: Path) -> list[dict[str, Any]]:
    """What the ranks measured."""
    return [json.loads(path.read_text()) for path in sorted(scratch.glob("facts-*.json"))]
