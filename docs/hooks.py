"""Let the pages link to files outside docs/, such as ``../ars2/muon.py``.

On the code host such a link works as it is. The site has only the pages: its links lead to the repository if
``repo_url`` is set, and otherwise to the checkout that the site was built in. Sphinx roles in docstrings, such as
``:func:`ars2.report```, become plain code.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# A link in Markdown that leads upwards, out of docs/ or of a folder in it.
UPWARDS = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")
# mkdocs checks every link without a scheme, so these get one until it has done so.
SCHEME = "repository:"
ROLE = re.compile(r":(?:class|func|meth|mod):(?=<code>)")
log = logging.getLogger("mkdocs.hooks.repository_links")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Check that linked files exist, and hide their links from mkdocs."""

    def hide(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match[1]))
        if target.startswith("docs/"):
            return match[0]
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match[1])
        return f"]({SCHEME}{target}{match[2] or ''})"

    return UPWARDS.sub(hide, markdown)


def on_page_content(html: str, page: Any, config: Any, **_: Any) -> str:
    """Lead the hidden links to the repository, or to the checkout."""
    checkout = "../" * (1 + page.file.src_uri.count("/"))
    base = f"{config.repo_url.rstrip('/')}/blob/main/" if config.repo_url else checkout
    return ROLE.sub("", html).replace(f'href="{SCHEME}', f'href="{base}')
