"""Adds what lies beside docs/ to the site: README.md as its first page, the scripts, and the results with their pages.

Links in the pages are those of the repository. A page of docs/ is one folder higher in the site. Formulas become
MathML, which browsers show without a script.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
BESIDE = "README.md", "LICENSE", "CITATION.cff", "*.py", "envs/*.py", "results/README.md", "results/*/*.[cp][sn][vg]"


def on_files(files, config):
    for path in sorted(path for pattern in BESIDE for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, **_):
    if page.file.src_uri in ("README.md", "results/README.md"):
        return markdown.replace("](docs/", "](").replace("](../docs/", "](../")
    return markdown.replace("](../results/", "](results/").replace("](../../results/", "](../results/")


def on_page_content(content, **_):
    return re.sub(r"\\\((.*?)\\\)", lambda formula: convert(html.unescape(formula[1])), content)
