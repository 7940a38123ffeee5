"""Sphinx's configuration. The pages it reads are written by build.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

project = "parallel-steps"
html_title = "parallel-steps"
extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_inline"]
# So that a page can link to a heading of another one.
myst_heading_anchors = 4
# Diffs of READMEs are excerpts, and blocks of output are no language.
suppress_warnings = ["misc.highlighting_failure"]
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js", "schedules.js", "mesh.js", "ring.js"]
html_show_sourcelink = html_copy_source = html_show_copyright = html_show_sphinx = False
