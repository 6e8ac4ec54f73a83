"""What the site has beside docs/: pages of the API, and the Markdown files at the top of the repository.

mkdocs calls these functions (`hooks` in mkdocs.yml). The pages of the API are made of docstrings, without importing the
package, in the order of the map.
"""

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import make_map  # noqa: E402

TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def api() -> list[tuple[str, str, str]]:
    """(title, page, Markdown) of every folder of the package."""
    pages = []
    for name, files in make_map.folders(make_map.PACKAGE, make_map.rooms()):
        dotted = f"opencola.{name}" if name else "opencola"
        text = [f"# {dotted}", ""]
        for path in files:
            if path.suffix == ".py" and path.stem != "__main__":
                own = path.stem == "__init__"
                text += [] if own else [f"## {dotted}.{path.stem}", ""]
                text += [f"::: {dotted if own else f'{dotted}.{path.stem}'}", ""]
        pages.append((name or "opencola", f"api/{name or 'opencola'}.md", "\n".join(text)))
    return pages


def on_config(config: Any) -> Any:
    """Put the pages of the API into the navigation, where it says API."""
    for entry in config["nav"]:
        if "API" in entry:
            entry["API"] = [{title: page} for title, page, _ in api()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for _, page, text in api():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they are in the repository become links of the site, and names where the site has no such page."""
    here = page.file.src_uri
    source = next((name for name, moved in TOP.items() if moved == here), f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))
        if target.startswith("docs/") or target in TOP:
            to = posixpath.relpath(TOP.get(target, target.removeprefix("docs/")), posixpath.dirname(here) or ".")
            return f"[{link[1]}]({to}{link[3] or ''})"
        if not (ROOT / target).exists():
            return link[0]  # and mkdocs says that it leads nowhere
        return link[1] if "`" in link[1] else f"`{link[1]}`"

    return LINK.sub(moved, markdown)
