"""Put the last `make crossover` into docs/crossover and the README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from blocks import put_block

from offpath.studies.crossover import CrossoverResult
from offpath.studies.crossover.plots import main_figure
from offpath.studies.crossover.tables import crossover_block
from offpath.studies.plots import to_svg

ROOT = Path(__file__).parent.parent
MADE, KEPT = ROOT / "runs" / "crossover" / "crossover.json", ROOT / "docs" / "crossover"

result = CrossoverResult.from_json(json.loads(MADE.read_text()))
if not result.complete or result.wrong:
    raise SystemExit(f"expected a complete run with right results in {MADE}; run make crossover again")
KEPT.mkdir(exist_ok=True)
shutil.copyfile(MADE, KEPT / "crossover.json")
(KEPT / "crossover.svg").write_text(to_svg(main_figure(result)))
put_block(ROOT / "README.md", "crossover", crossover_block(result))
