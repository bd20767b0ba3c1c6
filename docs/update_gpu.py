"""Put what `make gpu` has made, runs/gpu.json or the file named, into docs/bars and docs/gpu.md."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from blocks import put_block

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from gpu.pays import block, committed, is_whole, slug  # noqa: E402 (it lies beside the benchmarks)

MADE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "gpu.json")
KEPT = ROOT / "docs" / "bars"

if MADE.exists():
    content = json.loads(MADE.read_text())
    if not is_whole(content):
        raise SystemExit(f"expected the report of a whole run on a GPU, got {MADE}; run make gpu")
    for ending in (".json", ".txt"):
        shutil.copyfile(MADE.with_suffix(ending), KEPT / (slug(content["card"]) + ending))
elif len(sys.argv) > 1:
    raise SystemExit(f"there is no {MADE}; run make gpu")
put_block(ROOT / "docs" / "gpu.md", "gpu", block({path.stem: json.loads(path.read_text()) for path in committed(KEPT)}))
