"""Put what `offpath study topology` has made in runs/study-topology, or in the folder named, into docs/studies."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from blocks import put_block

from offpath.studies.plots import to_svg
from offpath.studies.topology import StudyResult
from offpath.studies.topology.config import FULL
from offpath.studies.topology.plots import figures
from offpath.studies.topology.tables import docs_block

ROOT = Path(__file__).parent.parent
MADE = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "study-topology") / "topology.json"
KEPT = ROOT / "docs" / "studies"

result = StudyResult.from_json(json.loads(MADE.read_text()))
if not result.complete or result.config != FULL:
    raise SystemExit(f"expected the whole study in {MADE}, got a quick one or a part; go on with make study")
shutil.copyfile(MADE, KEPT / "topology.json")
for name, figure in figures(result).items():
    (KEPT / f"topology-{name}.svg").write_text(to_svg(figure, salt=name))
put_block(KEPT / "topology.md", "study", docs_block(result))
