"""The marked blocks of a page, which stand between <!-- name --> and <!-- /name -->."""

from __future__ import annotations

import re
from pathlib import Path


def put_block(page: Path, name: str, block: str) -> None:
    """Let `block` be what stands in the one block `name` of `page`."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    text, replaced = marked.subn(lambda m: f"{m[1]}{block}\n{m[2]}", page.read_text())
    if replaced != 1:
        raise SystemExit(f"expected one block <!-- {name} --> ... <!-- /{name} --> in {page}, got {replaced}")
    page.write_text(text)
