"""The site builds without a warning, holds every module, and needs neither network nor script."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import site_parts  # noqa: E402  (docs/ is no package)

pytestmark = pytest.mark.xdist_group("site")  # built once


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    places = ["-d", out / "doctrees", ROOT / "docs", out / "html"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *places], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_the_site_builds_without_warnings_and_has_every_page(site):
    for page in [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").glob("*.ipynb")]:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists(), page


def test_every_module_is_in_the_api_reference(site):
    described = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    modules = [path.stem for path in ROOT.glob("*.py")]
    modules += [f"models.{path.stem}" for path in (ROOT / "models").glob("*.py")]
    for module in {*modules} - {"setup", "utils", "datasets", "models.__init__"}:
        assert f'id="module-{module}"' in described, f"{module}: is its room a page in docs/api?"


def test_names_of_user_code_are_described(site):
    for page, name in (
        ("sde_lib", "sde_lib.VESDE"),
        ("sampling", "sampling.get_pc_sampler"),
        ("losses", "losses.get_sde_loss_fn"),
        ("likelihood", "likelihood.get_likelihood_fn"),
        ("models", "models.utils.get_score_fn"),
        ("controllable_generation", "controllable_generation.get_pc_inpainter"),
    ):
        assert f'id="{name}"' in (site / f"api/{page}.html").read_text(), name


def test_pages_load_nothing_from_a_network(site):
    fetched = r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"(?:https?:)?//[^\"]*"
    for page in site.rglob("*.html"):
        assert re.findall(fetched, page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", style.read_text()), style


def test_formulas_are_mathml(site):
    page = (site / "concepts.html").read_text()
    assert page.count("<math") >= 10
    assert "$$" not in page


# --- docstrings as pages -----------------------------------------------------------------------


def test_docstrings_keep_their_words_and_lose_no_symbol():
    text = ["Two * stars, x_t and |z|, a `name` and ``f(x)``; see foo_.", "", "    y = A x + σ z"]
    found = "\n".join(site_parts.to_rst(text))
    assert r"Two \* stars, x\_t and \|z\|" in found
    assert "``name``" in found
    assert "``f(x)``" in found
    assert ".. code-block:: text\n\n        y = A x + σ z" in found


def test_arguments_become_a_list():
    text = [
        "One.",
        "",
        "Args:",
        "  a: first,",
        "    and more.",
        "  b, c: others.",
        "",
        "Raises: X.",
    ]
    found = "\n".join(site_parts.to_rst(text))
    assert "**Args:**" in found
    assert "- ``a``: first, and more." in found
    assert "- ``b, c``: others." in found
    assert "**Raises:** X." in found
