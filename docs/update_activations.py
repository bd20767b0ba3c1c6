"""Put what `benchmarks/activations.py` wrote, runs/activations.txt or the file named, into docs/activations.md."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from blocks import put_block

ROOT = Path(__file__).parent.parent
MADE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "activations.txt")

put_block(ROOT / "docs" / "activations.md", "activations", f"```text\n{MADE.read_text().strip()}\n```")
shutil.copyfile(MADE, ROOT / "docs" / "bars" / "activations-zen4.txt")
