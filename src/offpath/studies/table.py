"""A table of texts: the same on the terminal, in a report and in the docs."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, and rows of as many texts."""

    title: str
    header: Row
    rows: list[Row]

    def to_markdown(self) -> str:
        """The table as GitHub Markdown, its title in bold above it."""
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.header) + " |"]
        lines += ["|---|" + "---:|" * (len(self.header) - 1)]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in self.rows])
