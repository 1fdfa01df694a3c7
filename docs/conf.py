"""Sphinx's settings for `make book`; ddpo_lib/book/site.py calls it and writes what it reads."""

from importlib.util import find_spec

from ddpo_lib.book import site

project = "Finetuning diffusion models with reinforcement learning"
extensions = ["myst_nb"]
include_patterns = [
    "index.md",
    "gallery.md",
    "docs/fidelity.md",
    "benchmarks/README.md",
    "notebooks/*.ipynb",
]
exclude_patterns = ["data/runs"]  # not even looked into: it may be large

nb_execution_mode = "off"  # what the notebooks show is what they showed when they were run
nb_merge_streams = True
nb_ipywidgets_js = {}  # would come from another host
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = project
html_copy_source = html_use_index = False
html_show_copyright = False
html_show_search_summary = False  # browsers do not let a page from the disk fetch another
# MathJax, as in the notebooks, and all of it in one file: it needs neither network nor fonts.
(mathjax,) = find_spec("sphinx-mathjax-offline").submodule_search_locations
html_static_path = ["book.css", f"{mathjax}/static/mathjax/tex-svg-full.js"]
html_css_files = ["book.css"]
mathjax_path = "tex-svg-full.js"

setup = site.setup
