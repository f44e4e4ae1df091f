"""Write one page for each method from its docstring: `python docs/build_methods.py` (a test checks that they are current)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from rarefy import methods
from rarefy.engine import FAMILIES
from rarefy.errors import RarefyError
from rarefy.patterns import parse_pattern

FOLDER = Path(__file__).parent / "methods"


def options_as_list(text: str) -> str:
    """Turn the indented block under "Options" into a list; equations, indented too, stay blocks."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("Options") and line.endswith(":"):
            inside = True
            lines += [line, ""]
        elif inside and re.match(r"    \S", line):
            names, _, rest = line.strip().partition(":")
            lines.append(f"- `{names}`:{rest}")
        elif inside and line.startswith("        "):
            lines.append("  " + line.strip())
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


def needs_length(cls: type[methods.Method]) -> bool:
    """Whether the method, with its defaults, has to know the length of the run."""
    try:
        cls().clock(None)
    except RarefyError:
        return True
    return False


def pages() -> dict[str, str]:
    """Return file name -> text."""
    result = {}
    lines = ["# Methods", "", "One page each, made from the docstrings; `rarefy methods NAME` prints the same."]
    lines.append("What the groups mean, and which comparison is fair: [taxonomy](../taxonomy.md).")
    for name, cls in methods.available().items():
        text = inspect.cleandoc(cls.__doc__ or "")
        first, _, rest = text.partition("\n")
        level = "sparsity=0.9, " if hasattr(cls, "sparsity") else ""
        pattern = getattr(cls, "pattern", None)
        if isinstance(pattern, str) and parse_pattern(pattern).fixed_sparsity is not None:
            level = f'pattern="{pattern}", '
        call = f'rarefy.sparsify(model, "{name}", {level}optimizer=optimizer)'
        if cls.needs_calibration is True:  # with any options
            call = call.replace(")", ", calibration=[batch])")
        if needs_length(cls):
            call = call.replace(")", ", total_steps=steps)")
        builds = cls.model is not methods.Method.model  # its docstring tells how
        use = "" if name == "dense" or builds else f"```python\n{call}\n```\n\n"
        body = options_as_list(rest.strip("\n"))
        title = ", ".join((name, *cls.aliases))
        result[f"{name}.md"] = f"# {title}\n\n**{first}**\n\n{use}{body}\n"
    for family, members in methods.by_family().items():
        lines += ["", f"## {family.capitalize()}", "", f"{FAMILIES[family].capitalize()}.", ""]
        lines += [
            f"- [{name}]({name}.md): {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]}"
            for name, cls in members.items()
        ]
    result["README.md"] = "\n".join(lines) + "\n"
    return result


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        old.unlink()
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
