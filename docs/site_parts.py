"""What the site needs beyond Sphinx: modules of a room, plain docstrings as text, MathML."""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parent.parent


def setup(app) -> dict:
    """Sphinx calls this."""
    app.connect("source-read", _list_modules)
    app.connect("autodoc-process-docstring", _convert)
    app.connect("autodoc-process-bases", _name_bases)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_displayed_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# --- modules of a room ---------------------------------------------------------------------


def modules_of(room: str) -> list[str]:
    """The modules of a room: `sampling` and its seams `sampling_…`, or those of a package."""
    if (ROOT / room).is_dir():
        names = (path.stem for path in (ROOT / room).glob("*.py"))
        return [f"{room}.{name}" for name in sorted(names) if name != "__init__"]
    return [path.stem for path in (ROOT / f"{room}.py", *sorted(ROOT.glob(f"{room}_*.py")))]


def _list_modules(app, page, source) -> None:
    """A line `<!-- modules of ROOM -->` becomes a section for each module of the room."""

    def sections(match: re.Match) -> str:
        return "\n".join(
            f"## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
            for name in modules_of(match[1])
        )

    source[0] = re.sub(r"^<!-- modules of (\w+) -->$", sections, source[0], flags=re.MULTILINE)


# --- docstrings: plain text to reStructuredText --------------------------------------------

_LABEL = re.compile(r"(Args|Returns|Raises|Shapes?|Errors|Source|Yields)( [^:]*)?:(?=\s|$)(.*)")
_ENTRY = re.compile(r"(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*):(?=\s|$)\s*(.*)")
_ITEM = re.compile(r"([-*]|\d+\.) (.*)")


def _name_bases(app, name, obj, options, bases: list) -> None:
    """Bases that say nothing are left out."""
    bases[:] = [base for base in bases if base is not object]


def _convert(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def inline(text: str) -> str:
    """One line of a docstring, with what stands in backticks as code and the rest as it is."""
    parts = re.split(r"``(.+?)``|`(.+?)`", text)
    found = []
    for i in range(0, len(parts), 3):
        found.append(re.sub(r"([\\*_|`<>])", r"\\\1", parts[i]))
        if i + 1 < len(parts):
            # An escaped space ends markup without being seen.
            found.append(rf"\ ``{parts[i + 1] or parts[i + 2]}``\ ")
    return "".join(found).strip()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def to_rst(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText: labels (`Args:`) in bold, entries and items as lists, what
    is indented after an empty line kept as it is, all else plain text."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", "\n".join(lines).strip("\n"))
    return [line for block in blocks if block.strip() for line in (*_block(block.split("\n")), "")]


def _block(lines: list[str]) -> list[str]:
    """A stretch without empty lines; an indented one is a formula or code."""
    if _indent(lines[0]) > 0:
        return [".. code-block:: text", "", *("    " + line for line in lines)]
    found: list[str] = []
    for line in _joined(lines):
        label, item = _LABEL.fullmatch(line), _ITEM.fullmatch(line)
        entry = _ENTRY.fullmatch(line.strip()) if line.startswith(" ") else None
        if label:
            title = f"**{label[1]}{inline(label[2] or '')}:**"
            found += ["", f"{title} {inline(label[3].strip())}".rstrip(), ""]
        elif entry:
            found.append(f"- ``{entry[1]}``: {inline(entry[2])}")
        elif item:
            found.append(f"- {inline(item[2])}")
        else:
            found += [inline(line.strip()), ""]
    return found


def _joined(lines: list[str]) -> list[str]:
    """Lines with those joined that go on: deeper than an entry, or in a paragraph."""
    found: list[str] = []
    entries = False  # inside Args:
    base = 0
    for line in lines:
        depth = _indent(line)
        starts = (
            not found
            or (depth == 0 and (_LABEL.fullmatch(line) or _ITEM.fullmatch(line)))
            or (entries and depth == base and _ENTRY.match(line.strip()))
        )
        if entries and base == 0 and depth > 0:
            base, starts = depth, True
        if starts:
            found.append(line.rstrip())
        else:
            found[-1] += " " + line.strip()
        if depth == 0 and (label := _LABEL.fullmatch(line)):
            entries, base = not label[3].strip() or label[1] == "Args", 0
    return found


# --- formulas ------------------------------------------------------------------------------


def _mathml(latex: str, display: str) -> str:
    from latex2mathml.converter import convert

    return convert(latex, display=display)


def _inline_math(translator, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _displayed_math(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode
