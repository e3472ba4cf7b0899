"""The documentation site, by Sphinx: `make docs`, or `python -m sphinx docs build/docs`.

The pages are Markdown (MyST), as GitHub shows them too, and the notebooks with their kept outputs.
The API reference is made of the docstrings, which are plain text. Formulas become MathML at build
time, so that the site needs no script and no network to be read.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

project = "score-sde"
author = "the authors of score-sde"
copyright = author  # read by Sphinx under this name
extensions = ["sphinx.ext.autodoc", "myst_nb", "site_parts"]
exclude_patterns = ["build"]

# --- pages ---------------------------------------------------------------------------------
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # GitHub's anchors: [weights](evaluation.md#weights)
nb_execution_mode = "off"  # tests/test_notebooks.py executes them
html_math_renderer = "mathml"  # of site_parts

# --- API reference -------------------------------------------------------------------------
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "ignore-module-all": True,  # a name is described where it is defined
    "show-inheritance": True,
}
autodoc_inherit_docstrings = False  # a method without its own is described by its class or base
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
add_module_names = False

# --- looks ---------------------------------------------------------------------------------
html_theme = "furo"
html_title = "score-sde"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
