"""The HTML of a turn to markdown: by the library html-to-markdown, with what it does not know about ChatGPT's pages.

The library reads and writes; the functions here hand it simpler HTML (code blocks without their header bar, formulas
as TeX) and take back what it escaped, so that a text says what its writer wrote.
"""

import re
from collections.abc import Iterator
from functools import cache
from html import unescape
from itertools import islice
from typing import TYPE_CHECKING

from ochat_train.conversations.schema import RecordError

if TYPE_CHECKING:
    from html_to_markdown import ConversionOptions


MAX_DEPTH = 100  # elements in one another; an answer has up to 30
MAX_INDENT = 12  # lists, quotes and tables in one another: each writes every line inside it anew

# ---- What is HTML ----

# A > between quotes does not end a tag, unless the quotes are not closed.
_TAG = re.compile(r"""</?([a-zA-Z][a-zA-Z0-9]*)(?![\w-])(?:(?:"[^"<]*"|'[^'<]*'|[^<>"'])*+|[^<>]*)>""")
_RENDERED_TAG = re.compile(
    r"</?(?:a|abbr|b|blockquote|br|code|del|details|div|dl|em|figure|h[1-6]|hr|i|img|ins|kbd|mark|ol|p|pre|q|s|section|"
    r"small|span|strong|sub|sup|table|u|ul)(?![\w-])[^<>]*>",
    re.IGNORECASE,
)
_WRAPPERS = frozenset(("br", "div", "p", "span"))
_WRAPPER_TAG = re.compile(r"<(?:div|p|span)(?![\w-])[^<>]*>")

# What is around `markdown` makes it a class name of its own.
_MARK = re.compile(r"<div\b[^<>]*?\sclass\s*=\s*[\"'][^\"'<>]*(?<![\w-])markdown(?![\w-])", re.IGNORECASE)
_CODE_BAR = '<pre><div class="bg-black'


def is_rendered(answer: str) -> bool:
    r"""Whether an answer is HTML by ChatGPT's own marks: its `markdown` element, or the black bar over its code.

    Tags alone are no mark: people talk about HTML, and models write it.

    >>> is_rendered('<div class="markdown prose w-full"><p>Hi</p></div>')
    True
    >>> is_rendered("\n<div data-x='1' class='light markdown'>Hi</div>")
    True
    >>> is_rendered('<div><pre><div class="bg-black mb-4">...</div></pre></div>')
    True
    >>> is_rendered('<div class="markdown-body"><p>Hi</p></div>')
    False
    >>> is_rendered('Write `<div class="markdown">` around it.')
    False
    """
    start = answer.lstrip()
    return start.startswith("<") and (_MARK.match(start) is not None or _CODE_BAR in answer)


def has_tags(text: str) -> bool:
    """Whether any tag of a rendered text is in it.

    >>> has_tags("one<br>two")
    True
    >>> has_tags("if a < b and c > d: vector<int>")
    False
    """
    return "<" in text and _RENDERED_TAG.search(text) is not None


def is_wrapped(text: str, *, typed: bool) -> bool:
    """Whether a text of an HTML record is markup as a whole, and not only a text with tags in it.

    An answer that was rendered begins with an element. What a user typed (`typed`) has plain elements around it, or
    none: then the tags in it are the user's own words.

    >>> is_wrapped("<p>Hi</p>", typed=False), is_wrapped("<ol><li>Hi</li></ol>", typed=False)
    (True, True)
    >>> is_wrapped('<div class="whitespace-pre-wrap">Hi</div>', typed=True)
    True
    >>> is_wrapped("Write <b>Hi</b> in <p>", typed=False), is_wrapped("<p> is what?", typed=True)
    (False, False)
    >>> is_wrapped("<table><tr><td>my code</td></tr></table>", typed=True)
    False
    """
    if not typed:
        return _RENDERED_TAG.match(text.lstrip()) is not None
    return _WRAPPER_TAG.match(text.lstrip()) is not None and text.rstrip().endswith(("</div>", "</p>", "</span>"))


_FENCE = re.compile(r"^[ \t]*(?:`{3}|~{3})", re.MULTILINE)


def is_fenced(answer: str) -> bool:
    r"""Whether an answer is markdown, whatever it begins with: it has a fence, which a rendered one has in code only.

    >>> is_fenced("<details>\n\n```py\na  =  1\n```\n</details>")
    True
    >>> is_fenced("<p>So:</p><pre><code>\n```py\nx\n```\n</code></pre>"), is_fenced("<p>```</p>")
    (False, False)
    """
    if "```" not in answer and "~~~" not in answer:
        return False
    return not is_rendered(answer) and _FENCE.search(remove_elements(answer, "pre")) is not None


# ---- The whole way of one text ----


def convert_text(text: str, *, typed: bool, sure: bool) -> str:
    r"""The markdown of one text of an HTML record; `typed` by a user, or written and rendered by a model.

    A text that is no markup is only freed of entities. Which texts are markup `is_wrapped` says, or, if the whole
    record is known to be HTML (`sure`), any tag. An answer that is markdown stays as it is, with its entities, which
    are the model's own: one that `is_fenced`, and one that is no markup and has back-ticks, unless `sure`. Raises
    RecordError where the library fails or would lose text.

    >>> convert_text("<p>Use <code>a_b</code> if 1 &lt; 2:</p><ol start='3'><li>so</li></ol>", typed=False, sure=False)
    'Use `a_b` if 1 < 2:\n\n3. so'
    >>> convert_text("<div>1. my_list_\n  # 2</div>", typed=True, sure=False)
    '1. my_list_\n  # 2'
    >>> convert_text("Is 1 &lt; 2 <br> in\n\n  HTML?", typed=True, sure=False)
    'Is 1 < 2 <br> in\n\n  HTML?'
    >>> convert_text("one<br>two", typed=True, sure=True), convert_text("one<br>two", typed=True, sure=False)
    ('one\ntwo', 'one<br>two')
    >>> convert_text("Write `&lt;b&gt;` for it.", typed=False, sure=False)
    'Write `&lt;b&gt;` for it.'
    """
    if not typed and is_fenced(text):
        return text
    if not (has_tags(text) if sure else is_wrapped(text, typed=typed)):
        return text if "`" in text and not (typed or sure) else unescape_entities(text)
    html = simplify_code_blocks(remove_counter(_COMMENT.sub("", text) if "<!--" in text else text))
    html = remove_elements(remove_elements(html, "svg"), "button")
    if typed and all(tag[1].lower() in _WRAPPERS for tag in _TAG.finditer(html)):
        return unwrap(html)
    return render(simplify_math(html))


_COMMENT = re.compile(r"<!--[^<>]*-->")
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")


def unescape_entities(text: str) -> str:
    """With each entity, once, as its character; one without its `;`, as in an address, is none.

    >>> unescape_entities("1 &lt; 2 &amp;&amp; x&#39;s &amp;lt;")
    "1 < 2 && x's &lt;"
    >>> unescape_entities("/?a=1&copy=2&lt=3 R&D;")
    '/?a=1&copy=2&lt=3 R&D;'
    """
    return _ENTITY.sub(lambda entity: unescape(entity[0]), text) if "&" in text else text


def unwrap(html: str) -> str:
    r"""What a user typed, out of div, p, span and br: every line, space and sign as it is between the tags.

    >>> unwrap('<div class="whitespace-pre-wrap">a_b *c*\n\n\n  1. x \\ &lt;b&gt;</div>')
    'a_b *c*\n\n\n  1. x \\ <b>'
    >>> unwrap("<div>\n<p>one<br>two</p>\n<p>thr<span>ee</span></p>\n</div>")
    'one\ntwo\n\nthree'
    >>> unwrap("<div>one</div><div>two</div>"), unwrap("no tag\n  * x_y")
    ('one\ntwo', 'no tag\n  * x_y')
    """
    pieces: list[str] = []
    border = ""  # what the tags since the last piece put between it and the next
    at = 0
    for tag in [*_TAG.finditer(html), None]:
        piece = html[at : tag.start() if tag else len(html)]
        at = tag.end() if tag else len(html)
        name = tag[1].lower() if tag else "div"
        if piece.strip() or (pieces and not border and piece):  # white space between elements is the page's
            pieces += [border if pieces else "", piece]
            border = ""
        if name == "br":
            pieces.append("\n")
        elif name == "p":
            border = "\n\n"
        elif name == "div":
            border = border or "\n"
    return unescape_entities("".join(pieces))


# ---- What ChatGPT's pages have around a text ----


def remove_elements(html: str, name: str) -> str:
    """Without the elements of this name, which hold none of their own kind.

    >>> remove_elements('a<button class="flex"><i></i>Copy code</button>b<button>Copy</button>', "button")
    'ab'
    >>> remove_elements("&lt;button&gt; <b>bold</b> <button>never closed", "button")
    '&lt;button&gt; <b>bold</b> <button>never closed'
    """
    kept = []
    at = 0
    while (start := html.find(f"<{name}", at)) >= 0 and (end := html.find(f"</{name}>", start)) >= 0:
        kept.append(html[at:start])
        at = end + len(name) + 3
    return "".join(kept) + html[at:] if kept else html


_COUNTER = re.compile(r'<span class="flex-grow flex-shrink-0">\s*\d+\s*/\s*\d+\s*</span>')


def remove_counter(html: str) -> str:
    """Without the counter of regenerated answers, which has an element of its own.

    >>> remove_counter('<div><span class="flex-grow flex-shrink-0">1 / 2</span></div><p>Yes</p>')
    '<div></div><p>Yes</p>'
    >>> remove_counter("<p><span>3 / 4</span> of them</p>")
    '<p><span>3 / 4</span> of them</p>'
    """
    return _COUNTER.sub("", html) if "flex-shrink-0" in html else html


_LANGUAGE = re.compile(r"(?<![\w-])language-([\w+#.-]{1,30})")
_LANGUAGE_NAME = re.compile(r"[\w+#.-]{1,30}")
_BREAK = re.compile(r"<br\b[^<>]*>")
_LAST_LINE_END = re.compile(r"\r?\n((?:</\w+>)*)\Z")


def simplify_code_blocks(html: str) -> str:
    r"""With each code block as a bare `<pre><code>`, without colours and the bar above it: a language and Copy code.

    The language is the class `language-...` of the code, or else what the bar says. The line end behind the last line
    goes, since the fence has it. A `<pre>` with other text beside its code is left as it is.

    >>> bar = '<div class="bg-black"><div><span>python</span><button>Copy code</button></div>'
    >>> simplify_code_blocks(f'<pre>{bar}<div><code class="language-python"><i>if</i> x:\n</code></div></div></pre>')
    '<pre><code class="language-python">if x:</code></pre>'
    >>> simplify_code_blocks(f"<pre>{bar}<code>\n  x\n\n</code></div></pre>")
    '<pre><code class="language-python">\n  x\n</code></pre>'
    >>> simplify_code_blocks("<pre>Run <code>x</code> now</pre>")
    '<pre>Run <code>x</code> now</pre>'
    """
    pieces = []
    at = 0
    while (start := html.find("<pre", at)) >= 0 and (end := html.find("</pre>", start)) >= 0:
        pieces += [html[at:start], _simplify_code_block(html[start:end])]
        at = end
    return "".join(pieces) + html[at:] if pieces else html


def _simplify_code_block(block: str) -> str:
    """The same for one block, without its `</pre>`."""
    start, end = block.find("<code"), block.rfind("</code>")
    opening = _TAG.match(block, start) if start >= 0 else None
    if opening is None or end < opening.end():
        return block
    bar, code, rest = block[:start], block[opening.end() : end], block[end:]
    classed = _LANGUAGE.search(opening[0])
    shown = _visible(remove_elements(bar, "button")).removesuffix("Copy code").strip()
    is_bar = "<button" in bar or "Copy code" in bar or not shown or (classed and shown == classed[1])
    if not is_bar or _visible(rest):
        return block
    language = classed[1] if classed else shown if _LANGUAGE_NAME.fullmatch(shown) else ""
    code = _TAG.sub("", _BREAK.sub("\n", _LAST_LINE_END.sub(r"\1", code)))
    return f'<pre><code class="language-{language}">{code}</code>' if language else f"<pre><code>{code}</code>"


def _visible(html: str) -> str:
    return unescape(_TAG.sub("", html)).strip()


_KATEX = re.compile(r'<span class="katex(-display)?">')
_SPAN = re.compile(r"<(/?)span\b")
_TEX = re.compile(r'<annotation encoding="application/x-tex">([^<]*)</annotation>')


def simplify_math(html: str) -> str:
    r"""With each formula of KaTeX, which is in a page as MathML, as TeX and as drawn, as its TeX between dollars.

    >>> mathml = '<math><mi>x</mi><annotation encoding="application/x-tex">x_1 &lt; 2</annotation></math>'
    >>> katex = f'<span class="katex"><span>{mathml}</span><span aria-hidden="true">x1&lt;2</span></span>'
    >>> simplify_math(f"<p>If {katex}.</p>")
    '<p>If $x_1 &lt; 2$.</p>'
    >>> simplify_math(f'<span class="katex-display">{katex}</span>')
    '$$x_1 &lt; 2$$'
    >>> simplify_math("<p>It costs <span>$5</span>, or 6$.</p>")
    '<p>It costs <span>$5</span>, or 6$.</p>'
    """
    pieces = []
    at = 0
    while opening := _KATEX.search(html, at):
        end = _end_of_span(html, opening.end())
        formula = html[opening.end() : end]
        tex = _TEX.search(formula)
        dollars = "$$" if opening[1] else "$"
        pieces += [
            html[at : opening.start()],
            f"{dollars}{tex[1].strip()}{dollars}" if tex else _read_math(formula, dollars),
        ]
        at = end
    return "".join(pieces) + html[at:] if pieces else html


def _end_of_span(html: str, at: int) -> int:
    """Where the span ends whose opening tag ends at `at`: behind its closing tag."""
    depth = 1
    for tag in _SPAN.finditer(html, at):
        depth += -1 if tag[1] else 1
        if not depth:
            return html.find(">", tag.end()) + 1 or len(html)
    return len(html)


def _read_math(formula: str, dollars: str) -> str:
    """The TeX of a formula whose MathML lost its tags, so that its text runs into the TeX behind it.

    Both ways to draw it have the same characters, not always in the same order, so what exceeds them is the TeX. Where
    that fails, the formula as it is drawn, without dollars.
    """
    mathml, _, drawn = (_TAG.sub("", part) for part in formula.partition('<span class="katex-html"'))
    drawn = drawn.partition(">")[2].replace("\u200b", "")
    tex = mathml[len(drawn) :]
    return f"{dollars}{tex}{dollars}" if tex and sorted(mathml[: len(drawn)]) == sorted(drawn) else drawn or mathml


# ---- The library ----

_STAND_INS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # no characters, by Unicode's own word
_CODE_START = re.compile(r"<pre><code(?: class=\"language-[\w+#.-]+\")?>")
_CODE_END = "</code></pre>"
_ESCAPE = re.compile(r"(?<!\S)(\d*)\\(?=[#*+.)>~`-])")
_NESTED = re.compile(r"<(/?)((?i:blockquote|ol|table|ul))\b[^<>]*>")
_ROW_OR_CELL = re.compile(r"<(?i:(tr)|t[dh])\b")
_SPANNING_CELL = re.compile(r"<(?i:t[dh]\b[^<]*?\b(?:col|row)span)(?:\s*=\s*[\"']?(\d{1,2})(?=[\"'\s>]))?")
MAX_CELLS = 100_000  # of a table as markdown, or as many as the HTML has characters


def render(html: str) -> str:
    r"""The markdown of HTML, its text as it stands there: nothing is escaped but what a table or a link needs.

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
    """Begin, end and inside of each quote that is in no list, table or other quote.

    The library puts some paragraphs in quotes, and quotes behind one another, without the blank line that parts them.
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
    """The markdown of HTML by the library, but for what it does to a text.

    It always escapes what would be markdown at the beginning of a line. So the writer's own backslashes are hidden from
    it, and those at the beginning of its lines are removed. It also trims code and makes every space alike: characters
    that Unicode never assigns stand in for what must survive.
    """
    if not html:
        return ""
    free = list(islice((stand_in for stand_in in _STAND_INS if stand_in not in html), 3))
    if len(free) < 3:
        raise RecordError("html_not_converted", "its text has all characters that stand in for others")
    backslash, space, edge = free
    hidden = html.replace("\\", backslash).replace("\u00a0", space).replace("&nbsp;", space)
    if _CODE_END in hidden:
        hidden = _CODE_START.sub(rf"\g<0>{edge}", hidden).replace(_CODE_END, edge + _CODE_END)
    markdown = _convert(hidden).strip()
    if not markdown and _visible(html):
        raise RecordError("html_not_converted", "the library left nothing of its text")
    if "\\" in markdown:
        markdown = _ESCAPE.sub(r"\1", markdown)
    return markdown.replace(edge, "").replace(space, "\u00a0").replace(backslash, "\\")


def _refuse_bombs(html: str) -> None:
    """Raises RecordError for small HTML that would become huge markdown."""
    depth = 0
    for tag in _NESTED.finditer(html):
        depth = max(depth - 1, 0) if tag[1] else depth + 1
        if depth > MAX_INDENT:
            raise RecordError("html_too_deep", f"more than {MAX_INDENT} lists, quotes and tables in one another")
    # Markdown writes out each cell that a row lacks, and the library goes up to 1,000 columns.
    num_rows = num_cells = widest = 0
    for place in _ROW_OR_CELL.finditer(html):
        num_rows, num_cells = (num_rows + 1, 0) if place[1] else (num_rows, num_cells + 1)
        widest = max(widest, num_cells)
    spans = [int(span[1] or 1000) for span in _SPANNING_CELL.finditer(html)]
    span = max(spans, default=1)
    if span >= 100 or num_rows * min(widest * span, 1000) > max(MAX_CELLS, len(html)):
        raise RecordError("html_not_converted", f"a table of {num_rows:,} rows would have too many cells")


def _convert(html: str) -> str:
    import html_to_markdown  # here, since most dumps hold no HTML

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

    # Members, where names would do: the library looks names up at every call, which takes as long as a short answer.
    return library.ConversionOptions(
        heading_style=library.HeadingStyle.ATX,
        list_indent_type=library.ListIndentType.SPACES,
        bullets="-",
        compact_tables=True,
        br_in_tables=True,
        sub_symbol="<sub>",
        sup_symbol="<sup>",
        highlight_style=library.HighlightStyle.DOUBLE_EQUAL,
        extract_metadata=False,
        whitespace_mode=library.WhitespaceMode.NORMALIZED,
        newline_style=library.NewlineStyle.SPACES,
        code_block_style=library.CodeBlockStyle.BACKTICKS,
        inline_data_media=library.InlineDataMedia.ALT_TEXT_ONLY,
        hidden_content=library.HiddenContent.DROP,
        url_escape_style=library.UrlEscapeStyle.ANGLE,
        link_style=library.LinkStyle.INLINE,
        output_format=library.OutputFormat.MARKDOWN,
        tier_strategy=library.TierStrategy.AUTO,
        max_depth=MAX_DEPTH,
    )
