"""Hooks of mkdocs: what the site needs beyond the pages as they are read in the repository."""

import re
from html import escape
from pathlib import Path
from typing import Any

ROW, INDENT = 30, 150  # px of a room's row; left of the names, where arrows run
NODE = r"(\w+)(?:[\[(]+(.*?)[\])]+)?"
EDGE = re.compile(rf"^\s*{NODE} -(?:- (\w+) -|-|\. ([\w ]+) \.)-?> {NODE}$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """List the decisions, one page each, where the navigation has their folder."""
    for entry in config.nav:
        if entry.get("Decisions") == "decisions/":
            entry["Decisions"] = sorted(
                f"decisions/{page.name}" for page in Path(config.docs_dir, "decisions").glob("*.md")
            )
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files outside of docs/ become their text, since they are no pages of the site; mermaid is drawn."""
    markdown = re.sub(r"```mermaid\n(.*?)```", lambda fence: draw(fence[1]), markdown, flags=re.DOTALL)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:data|ochat_train)/[^)]*\)", r"\1", markdown)


def draw(mermaid: str) -> str:
    """A flowchart of mermaid as SVG in one column, since its own script comes from another host.

    The nodes are in the order of the text; a solid arrow's label is beside the node that gives, a dotted one is dashed.
    """
    names: dict[str, str] = {}
    edges = []
    for giver, giver_name, label, dotted, taker, taker_name in EDGE.findall(mermaid):
        names |= {node: name.strip('"') for node, name in ((giver, giver_name), (taker, taker_name)) if name}
        edges.append((giver, taker, label, dotted))
    order = list(dict.fromkeys(node for giver, taker, *_ in edges for node in (giver, taker)))
    heights = {node: ROW * number + ROW // 2 for number, node in enumerate(order)}
    parts = []
    for giver, taker, _, dotted in edges:
        start, end = heights[giver] + 4, heights[taker] - 4
        bend = INDENT - 20 - (INDENT - 20) * 1.3 * abs(end - start) / (ROW * len(order))
        path = f"M{INDENT - 6} {start}C{bend:.0f} {start} {bend:.0f} {end} {INDENT - 6} {end}"
        dashes = ' stroke-dasharray="4 3"' if dotted else ""
        parts.append(f'<path d="{path}"{dashes} fill="none" stroke="#888" marker-end="url(#arrow)"/>')
    for node in order:
        gives = ", ".join(label for giver, _, label, _ in edges if giver == node and label)
        text = f'<tspan font-weight="bold">{escape(names.get(node, node))}</tspan>'
        text += f'<tspan dx="10" font-size="11">{escape(gives)}</tspan>' if gives else ""
        parts.append(f'<text x="{INDENT}" y="{heights[node] + 5}" fill="currentColor" font-size="13">{text}</text>')
    tip = '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path d="M0 0L8 4L0 8z" fill="#888"/></marker>'
    size = f'viewBox="0 0 460 {ROW * len(order)}" style="max-width: 640px; width: 100%"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><defs>{tip}</defs>{"".join(parts)}</svg>\n'
