"""HTML to markdown by the library html-to-markdown, with every text as its writer wrote it."""

import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from itertools import islice
from typing import TYPE_CHECKING

from ochat_train.conversations.schema import RecordError

if TYPE_CHECKING:
    from html_to_markdown import ConversionOptions

# A > between quotes does not end a tag, unless the quotes are not closed.
TAG = re.compile(r"""</?([a-zA-Z][a-zA-Z0-9]*)(?![\w-])(?:(?:"[^"<]*"|'[^'<]*'|[^<>"'])*+|[^<>]*)>""")
_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # which Unicode never assigns to characters
_CODE_START = re.compile(r"<pre><code(?: class=\"language-[\w+#.-]+\")?>")
_CODE_END = "</code></pre>"
_ESCAPE = re.compile(r"(?<!\S)(\d*)\\(?=[#*+.)>~`-])")
_NESTED = re.compile(r"<(/?)((?i:blockquote|ol|table|ul))\b[^<>]*>")
_ROW_OR_CELL = re.compile(r"<(?i:(tr)|t[dh])\b")
_SPANNING_CELL = re.compile(r"<(?i:t[dh]\b[^<]*?\b(?:col|row)span)(?:\s*=\s*[\"']?(\d{1,2})(?=[\"'\s>]))?")
MAX_DEPTH = 100  # elements in one another; an answer has up to 30
MAX_INDENT = 12  # lists, quotes and tables in one another: each writes every line inside it again
MAX_CELLS = 100_000  # of a table as markdown, or as many as the HTML has characters


def visible_text(html: str) -> str:
    """The text of HTML without tags, entities as characters, trimmed.

    >>> visible_text("<b>1 &lt; 2</b> "), visible_text("1 < 2")
    ('1 < 2', '1 < 2')
    """
    return unescape(TAG.sub("", html)).strip()


def render(html: str) -> str:
    r"""The markdown of HTML with its text as it is: nothing is escaped except what a table or a link needs.

    Raises RecordError where the library fails or would lose text, and for small HTML that has huge markdown.

    >>> render("my_list * 2")
    'my_list * 2'
    >>> render("<h2># one</h2><p>1. two<br>3\\ <em>a</em>b</p>")
    '## # one\n\n1. two  \n3\\ *a*b'
    >>> render("<ul><li>- a<pre><code>  #\\n\n\n  x</code></pre></li></ul>")
    '- - a\n\n  ```\n    #\\n\n\n    x\n  ```'
    >>> render("<table><tr><th>a|b</th></tr><tr><td>1&nbsp;c<br>d</td></tr></table>")
    '| a\\|b |\n| --- |\n| 1\xa0c<br>d |'
    >>> render("<blockquote><ol><li>a</li></ol><p>b</p></blockquote><blockquote><p>c</p></blockquote>")
    '> 1. a\n>\n> b\n\n> c'
    """
    _refuse_bombs(html)
    blocks = []
    at = 0
    for start, end, quoted in _find_quotes(html):
        lines = render(quoted).split("\n")
        blocks += [_render(html[at:start]), "\n".join(f"> {line}" if line else ">" for line in lines)]
        at = end
    return "\n\n".join(block for block in [*blocks, _render(html[at:])] if block)


def _find_quotes(html: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, inside) of each quote that is in no list, table or other quote.

    The library omits the blank lines between some paragraphs in a quote, and between a quote and the next.
    """
    if "<blockquote" not in html:
        return
    depth = 0
    quote = None
    for tag in _NESTED.finditer(html):
        if not tag[1]:
            quote = tag if not depth and tag[2] == "blockquote" else quote
            depth += 1
        elif depth:
            depth -= 1
            if quote and not depth:
                yield quote.start(), tag.end(), html[quote.end() : tag.start()]
                quote = None


def _render(html: str) -> str:
    """The library's markdown of HTML, without its changes to the text.

    The library always escapes what would be markdown at the beginning of a line, trims code and makes all spaces the
    same. So the writer's backslashes, the ends of code and no-break spaces are first replaced by characters that
    Unicode never assigns; they are put back after the library's backslashes at the beginnings of lines are removed.
    """
    if not html:
        return ""
    free = list(islice((stand_in for stand_in in _STAND_INS if stand_in not in html), 3))
    if len(free) < 3:
        raise RecordError("html_not_converted", "its text has too many of the characters that the conversion needs")
    backslash, space, edge = free
    hidden = html.replace("\\", backslash).replace("\u00a0", space).replace("&nbsp;", space)
    if _CODE_END in hidden:
        hidden = _CODE_START.sub(rf"\g<0>{edge}", hidden).replace(_CODE_END, edge + _CODE_END)
    markdown = _convert(hidden).strip()
    if not markdown and visible_text(html):
        raise RecordError("html_not_converted", "the library left nothing of its text")
    if "\\" in markdown:
        markdown = _ESCAPE.sub(r"\1", markdown)
    return markdown.replace(edge, "").replace(space, "\u00a0").replace(backslash, "\\")


def _refuse_bombs(html: str) -> None:
    """Raise RecordError for small HTML that would become huge markdown."""
    depth = 0
    for tag in _NESTED.finditer(html):
        depth = max(depth - 1, 0) if tag[1] else depth + 1
        if depth > MAX_INDENT:
            raise RecordError("html_too_deep", f"more than {MAX_INDENT} lists, quotes and tables in one another")
    # Markdown has every cell that a row lacks, and the library makes up to 1,000 columns.
    num_rows = num_cells = widest = 0
    for place in _ROW_OR_CELL.finditer(html):
        num_rows, num_cells = (num_rows + 1, 0) if place[1] else (num_rows, num_cells + 1)
        widest = max(widest, num_cells)
    spans = [int(span[1] or 1000) for span in _SPANNING_CELL.finditer(html)]
    span = max(spans, default=1)
    if span >= 100 or num_rows * min(widest * span, 1000) > max(MAX_CELLS, len(html)):
        raise RecordError("html_not_converted", f"a table of {num_rows:,} rows would have too many cells")


def _convert(html: str) -> str:
    import html_to_markdown  # here, since most dumps have no HTML

    try:
        result = html_to_markdown.convert(html, _options())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library is no Exception
        raise RecordError("html_not_converted", f"{type(error).__name__}: {error!s:.200}") from None
    if any(str(warning.kind) == "depth_limit_exceeded" for warning in result.warnings):
        raise RecordError("html_too_deep", f"more than {MAX_DEPTH} elements in one another")
    return result.content or ""


@cache
def _options() -> "ConversionOptions":
    import html_to_markdown as library

    return library.ConversionOptions(
        bullets="-",
        compact_tables=True,
        br_in_tables=True,
        sub_symbol="<sub>",
        sup_symbol="<sup>",
        extract_metadata=False,
        inline_data_media=library.InlineDataMedia.ALT_TEXT_ONLY,
        max_depth=MAX_DEPTH,
    )
