"""What runs have shown: a leaderboard, `table.json`, and one stand-alone HTML page."""

from __future__ import annotations

from rarefy.report.console import print_leaderboard
from rarefy.report.leaderboard import Difference, Row, leaderboard, write_table
from rarefy.report.markdown import markdown
from rarefy.report.page import write_html
from rarefy.report.reading import collect
from rarefy.report.records import Comparison, Run

__all__ = [
    "Comparison",
    "Difference",
    "Row",
    "Run",
    "collect",
    "leaderboard",
    "markdown",
    "print_leaderboard",
    "write_html",
    "write_table",
]
