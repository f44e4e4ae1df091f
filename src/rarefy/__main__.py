"""`python -m rarefy` is `rarefy`."""

from __future__ import annotations

from rarefy.cli import main

if __name__ == "__main__":
    main()
