"""Hooks of mkdocs: what the site needs beyond the pages as they are read in the repository."""

import re
from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """List the decisions, one page each, where the navigation has their folder."""
    for entry in config.nav:
        if entry.get("Decisions") == "decisions/":
            entry["Decisions"] = sorted(
                f"decisions/{page.name}" for page in Path(config.docs_dir, "decisions").glob("*.md")
            )
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of docs/ become their text, since they are no pages of the site."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:data|ochat_train)/[^)]*\)", r"\1", markdown)
