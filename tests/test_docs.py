"""The pages are true: links lead somewhere, code runs, commands parse, docstrings are there."""

import ast
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import torch
from absl import flags
from ml_collections import config_flags

import main
from configs.validation import complete

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: The first line of a block that is compiled only, its imports executed, with the reason.
NOT_RUN = "# not run by the tests: "


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return [body for info, body in FENCE.findall(path.read_text()) if info == language]


pages = pytest.mark.parametrize("path", PAGES, ids=name_of)


# --- links -----------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", path.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[`*$]|\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).strip().replace(" ", "-") for title in plain}


def links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", path.read_text()))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pages
def test_links_lead_to_files_and_headings_that_exist(path):
    for link in links(path):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: its headings are {sorted(anchors(target))}"


# --- Python ------------------------------------------------------------------------------------


def numbers_and_words(text: str) -> tuple[list[float], str]:
    number = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"
    words = re.sub(number, "#", text)
    return [float(found) for found in re.findall(number, text)], " ".join(words.split())


def run(path: Path, names: dict) -> None:
    """Run a page's blocks one after the other, and hold what they print to the text under them."""
    text = path.read_text()
    for match in re.finditer(FENCE, text):
        if match[1] != "python":
            continue
        code = compile(match[2], f"{name_of(path)}: {match[2][:60]!r}", "exec", ast.PyCF_ONLY_AST)
        if match[2].startswith(NOT_RUN):
            code.body = [
                node for node in code.body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name_of(path), "exec"), names)
        shown = re.match(r"\n\n```text\n(.*?)```", text[match.end() :], re.DOTALL)
        if shown:
            found, words = numbers_and_words(printed.getvalue())
            expected, expected_words = numbers_and_words(shown[1])
            assert words == expected_words
            # Training and random numbers may differ a little between machines and versions.
            assert found == pytest.approx(expected, rel=0.2, abs=0.04)


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if path.name != "README.md" and blocks(path, "python")],
    ids=name_of,
)
def test_python_blocks_run_and_print_what_stands_under_them(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run(path, {"__name__": f"page_{path.stem}"})


# --- commands ----------------------------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """The words of every command of a page's shell blocks, without comments."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, "#"
        if words := list(lexer):
            found.append(words)
    return found


def check_main(words: list[str]) -> None:
    """Parse the flags of `main.py` as it does, without running anything."""
    any_config = str(ROOT / "configs/vp/digits_ddpmpp_continuous.py")
    config, rest, it = None, [], iter(words)
    for word in it:
        if word == "--config":
            path = next(it)
            config = main.load_config(any_config if "…" in path or "NAME" in path else path)
        elif word == "…":
            config = config or main.load_config(any_config)
        else:
            rest.append(word)
    keys = [word for word in rest if word.startswith("--config.")]
    if keys:
        assert config is not None, "keys of a config without a config"
        for word in keys:
            main._check_key(word, config)
        parsed = flags.FlagValues()
        keys = [re.sub(r"=K$", "=1", word) for word in keys]
        config_flags.DEFINE_config_dict(
            "config", config, lock_config=True, flag_values=parsed, sys_argv=["main.py", *keys]
        )
        parsed(["main.py", *keys])
        complete(parsed.config)
    known = main.FLAGS
    others = iter([word for word in rest if not word.startswith("--config.")])
    for word in others:
        flag, given, value = word.removeprefix("--").partition("=")
        assert word.startswith("--"), f"stray argument {word}"
        assert flag in known, f"there is no flag {word}"
        if not given and not isinstance(known[flag].value, bool):
            value = next(others)
        if flag == "mode":
            assert value in main.MODES


@pages
def test_commands_name_flags_configs_keys_and_targets_that_exist(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text()
    for words in commands(path):
        line = " ".join(words)
        if "main.py" in words:
            check_main(words[words.index("main.py") + 1 :])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
            assert (ROOT / f"{words[2].replace('.', '/')}.py").exists(), line
        for extra in re.findall(r"\.\[(\w+)\]", line):
            assert f'"{extra}": ' in (ROOT / "setup.py").read_text(), line


@pages
def test_configs_named_in_the_text_exist(path):
    for name in re.findall(r"\bconfigs/[a-z][\w/]*\.py", path.read_text()):
        assert (ROOT / name).exists(), name


# --- what pages say of the code ------------------------------------------------------------------


def test_the_design_has_a_row_for_every_room_with_what_it_imports():
    from test_structure import ROOMS

    rows = re.findall(
        r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "docs/design.md").read_text(), re.M
    )
    said = {
        room: None if imports.strip() == "every room" else set(re.findall(r"`(\w+)`", imports))
        for room, imports in rows
    }
    assert said == ROOMS


def test_the_migration_guide_names_all_published_configs():
    import json

    published = json.loads((ROOT / "tests/data/published_configs.json").read_text())["configs"]
    section = (ROOT / "docs/migrating.md").read_text().split("## Configs")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(configs/[\w/]+/)` \| (.*) \|$", section, re.MULTILINE)
    named = {folder + name + ".py" for folder, row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(published)
    assert len(named) == 39


#: What choosing_a_sampler.md quotes of the digits' table: evaluations and distance.
QUOTED = {
    "euler_maruyama": {10: "1.99", 100: "0.33"},
    "ancestral_sampling": {100: "0.32"},
    "ddim": {10: "0.42"},
    "dpmpp_2m": {10: "0.38", 8: "0.38"},
    "dpmpp_3m": {8: "0.64"},
    "sa_solver": {13: "0.34"},
}


@pytest.mark.parametrize("solver", QUOTED)
def test_the_guide_to_samplers_quotes_the_measured_table(solver):
    measured = (ROOT / "docs/solvers.md").read_text()
    guide = (ROOT / "docs/choosing_a_sampler.md").read_text()
    row = re.search(rf"^\| `{solver}`(?: ~)? \| \d+ \| ([\d.]+ \(.*) \|$", measured, re.MULTILINE)
    assert row is not None
    for evaluations, distance in QUOTED[solver].items():
        assert f"{distance} ({evaluations})" in row[1]
        assert distance in guide


# --- docstrings --------------------------------------------------------------------------------

SOURCES = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "models").glob("*.py"))]
TREES = {path: ast.parse(path.read_text()) for path in SOURCES if path.name != "setup.py"}
CLASSES = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}


def ancestors(cls: ast.ClassDef):
    """The classes of this library that a class is derived from, by their names."""
    for base in cls.bases:
        name = getattr(base, "id", getattr(base, "attr", ""))
        if name in CLASSES and name != cls.name:
            yield CLASSES[name]
            yield from ancestors(CLASSES[name])


def described(cls: ast.ClassDef, method: str) -> bool:
    """Whether a class says what this method does, or the networks' rule holds: a layer's class says
    what its `forward` does."""
    if method == "forward" and ast.get_docstring(cls):
        return True
    return any(
        isinstance(node, ast.FunctionDef) and node.name == method and bool(ast.get_docstring(node))
        for owner in (cls, *ancestors(cls))
        for node in owner.body
    )


def undescribed(path: Path):
    tree = TREES[path]
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                public = isinstance(method, ast.FunctionDef) and not method.name.startswith("_")
                if public and not described(node, method.name):
                    yield f"{node.name}.{method.name}"


@pytest.mark.parametrize("path", list(TREES), ids=name_of)
def test_every_public_name_has_a_docstring_of_its_own_or_its_base(path):
    assert list(undescribed(path)) == []


@pytest.mark.parametrize("path", list(TREES), ids=name_of)
def test_docstrings_begin_with_a_sentence(path):
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    for node in ast.walk(TREES[path]):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text:
            first, _, then = text.partition("\n\n")
            name = getattr(node, "name", path.name)
            assert first[-1] in ".:;!?)],…" or then.startswith("    "), f"{name}: {first!r}"
