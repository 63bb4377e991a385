"""One command that measures everything on a borrowed GPU; see README.md."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PREPARED = Path(__file__).resolve().parent / "prepared"  # git ignores it; it travels beside the tree
