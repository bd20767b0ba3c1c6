"""Put the numbers of the last `make demo` into docs/demo and the README (this is `make readme`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from blocks import put_block

from offpath.studies import RunConfig
from offpath.studies.plots import race_figure, to_svg
from offpath.studies.race import RaceResult
from offpath.studies.tables import demo_block

ROOT = Path(__file__).parent.parent
MADE, KEPT = ROOT / "runs" / "demo" / "race.json", ROOT / "docs" / "demo"

result = RaceResult.from_json(json.loads(MADE.read_text()))
if result.config != RunConfig().to_json():
    raise SystemExit(f"expected the race of make demo in {MADE}, got another one; go on with make readme")
shutil.copyfile(MADE, KEPT / "race.json")
(KEPT / "race.svg").write_text(to_svg(race_figure(result)))
put_block(ROOT / "README.md", "demo", demo_block(result))
