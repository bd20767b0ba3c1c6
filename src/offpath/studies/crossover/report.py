"""`report.html` and `crossover.svg` of a crossover."""

from __future__ import annotations

from pathlib import Path

from offpath.cost.crossover import OFFPATH
from offpath.studies.crossover.plots import block_figure, main_caption, main_figure
from offpath.studies.crossover.result import CrossoverResult
from offpath.studies.crossover.tables import LEGEND, Block, blocks, warnings
from offpath.studies.files import write_text
from offpath.studies.page import write_page
from offpath.studies.plots import to_svg


def write_report(result: CrossoverResult, folder: Path) -> None:
    """Write the page and the plot that opens it into `folder`; raises `RunError` when they cannot be written."""
    main = to_svg(main_figure(result))
    write_text(folder / "crossover.svg", main)
    write_page(
        folder / "report.html",
        "crossover/report.html.jinja",
        machine=result.machine,
        result=result,
        main=main,
        caption=main_caption(result),
        blocks=[(block, _figure(result, block)) for block in blocks(result)],
        warnings=warnings(result),
        legend=LEGEND,
    )


def _figure(result: CrossoverResult, block: Block) -> str:
    """The block's plot; nothing when there is no speed to be drawn."""
    if all(point.speedup(OFFPATH) is None for case in block.cases for point in result.row(case)):
        return ""
    return to_svg(block_figure(result, block), salt=block.title)
