"""A table of texts: the same on the terminal, in a report and in the docs."""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[str, ...]


def percent(sparsity: float) -> str:
    """A sparsity as it is written everywhere; below one, it is never 100%.

    >>> percent(0.95), percent(0.985), percent(0.99999999)
    ('95%', '98.5%', '99.999999%')
    """
    short = f"{100 * sparsity:.4g}%"
    return short if sparsity == 1 or short != "100%" else f"{100 * sparsity:.12g}%"


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
