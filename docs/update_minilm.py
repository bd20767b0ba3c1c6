"""Put what `offpath study minilm` has made in runs/study-minilm, or in the folder named, into docs/studies."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from blocks import put_block

from offpath.studies.compression.config import FULL
from offpath.studies.compression.plots import figures
from offpath.studies.compression.result import StudyResult
from offpath.studies.compression.tables import docs_block
from offpath.studies.plots import to_svg

ROOT = Path(__file__).parent.parent
MADE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "study-minilm") / "minilm.json"
KEPT = ROOT / "docs" / "studies"

result = StudyResult.from_json(json.loads(MADE.read_text()))
if not result.complete or result.config != FULL:
    raise SystemExit(f"expected the whole study in {MADE}, got a quick one or a part; go on with make minilm")
shutil.copyfile(MADE, KEPT / "minilm.json")
for name, figure in figures(result).items():
    (KEPT / f"minilm-{name}.svg").write_text(to_svg(figure, salt=name))
put_block(KEPT / "minilm.md", "study", docs_block(result))
