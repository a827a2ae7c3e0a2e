"""What MkDocs calls while it builds the site: pages and pictures that are made, and the check that nothing is fetched.

MkDocs runs this file by its path, so that its neighbours are found through ``sys.path``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import pictures

ROOT = Path(__file__).parents[2]
RESULTS = "benchmarks/results"  # whose pictures docs/performance.md shows by their place in the repository
LICENCE = "LICENSE.txt"
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")  # of the repository, which are pages of the site too
COMMANDS = [sys.executable, "-m", "typer", "pycse.cli", "utils", "docs", "--name", "pycse", "--title", "Command line"]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name in pictures.PICTURES:
        files.append(File.generated(config, f"pictures/{name}.svg", content=pictures.svg(name)))
    for path in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    for name in PAGES:
        words = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name.lower(), content=words))
    files.append(File.generated(config, LICENCE, content=(ROOT / "LICENSE").read_bytes()))
    done = subprocess.run(COMMANDS, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise PluginError(f"typer could not write the page of the commands:\n{done.stderr}")
    files.append(File.generated(config, "reference/cli.md", content=done.stdout))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that leave docs/ are written for readers of the repository."""
    for theirs, ours in ((f"{RESULTS}/", "results/"), ("LICENSE", LICENCE), *((name, name.lower()) for name in PAGES)):
        markdown = markdown.replace(f"](../{theirs}", f"]({ours}")
    return markdown


class Loads(HTMLParser):
    """Addresses that a browser fetches when it shows the page; links that a reader may follow are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        wanted = [given.get("src"), given.get("srcset"), given.get("data"), given.get("poster")]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            wanted.append(given.get("href"))
        self.found += [address for address in wanted if address]


ELSEWHERE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


def on_post_build(config: MkDocsConfig) -> None:
    """Fails where a page would ask another server for anything."""
    site, wrong = Path(config.site_dir), []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            text = path.read_text(encoding="utf-8")
            page = Loads()
            page.feed(text)
            found = [address for address in page.found if ELSEWHERE.match(address)] + IN_STYLES.findall(text)
        elif path.suffix in (".css", ".svg"):
            found = IN_STYLES.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        wrong += [f"{path.relative_to(site)}: {address}" for address in found]
    if wrong:
        raise PluginError("the site asks other servers for files:\n" + "\n".join(wrong))
