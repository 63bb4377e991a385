"""The HTML of a turn to markdown: which texts are HTML, and what ChatGPT's pages have around their texts.

The functions here give `markdown.render` simpler HTML: code blocks without the bar above them, formulas as TeX. They
search the HTML for a few tags, where a parsed tree would change the text between the tags.
"""

import re
from collections.abc import Callable
from html import unescape

from ochat_train.conversations.markdown import TAG, render, visible_text

# ---- What is HTML ----

_RENDERED_TAG = re.compile(
    r"</?(?:a|abbr|b|blockquote|br|code|del|details|div|dl|em|figure|h[1-6]|hr|i|img|ins|kbd|mark|ol|p|pre|q|s|section|"
    r"small|span|strong|sub|sup|table|u|ul)(?![\w-])[^<>]*>",
    re.IGNORECASE,
)
_WRAPPERS = frozenset(("br", "div", "p", "span"))
_WRAPPER_TAG = re.compile(r"<(?:div|p|span)(?![\w-])[^<>]*>")

# The class `markdown`, not a longer name that contains it.
_MARK = re.compile(r"<div\b[^<>]*?\sclass\s*=\s*[\"'][^\"'<>]*(?<![\w-])markdown(?![\w-])", re.IGNORECASE)
_CODE_BAR = '<pre><div class="bg-black'


def is_rendered(answer: str) -> bool:
    r"""Whether an answer is ChatGPT's own HTML: it has the `markdown` element, or the black bar above code.

    Tags alone prove nothing: people talk about HTML, and models write it.

    >>> is_rendered('<div class="markdown prose w-full"><p>Hi</p></div>')
    True
    >>> is_rendered('Write `<div class="markdown">` around it.')
    False
    """
    start = answer.lstrip()
    return start.startswith("<") and (_MARK.match(start) is not None or _CODE_BAR in answer)


def is_wrapped(text: str, *, typed: bool) -> bool:
    """Whether a text of an HTML record is markup as a whole, and not plain text with tags in it.

    A rendered answer begins with an element. A user's text (`typed`) has plain elements around it, or none: then the
    tags in it are the user's own words.

    >>> is_wrapped('<div class="whitespace-pre-wrap">Hi</div>', typed=True)
    True
    >>> is_wrapped("Write <b>Hi</b> in <p>", typed=False), is_wrapped("<p> is what?", typed=True)
    (False, False)
    """
    if not typed:
        return _RENDERED_TAG.match(text.lstrip()) is not None
    return _WRAPPER_TAG.match(text.lstrip()) is not None and text.rstrip().endswith(("</div>", "</p>", "</span>"))


_FENCE = re.compile(r"^[ \t]*(?:`{3}|~{3})", re.MULTILINE)


def is_fenced(answer: str) -> bool:
    r"""Whether an answer is markdown, whatever it begins with: it has a fence, as a rendered answer has only in code.

    >>> is_fenced("<details>\n\n```py\na  =  1\n```\n</details>")
    True
    >>> is_fenced("<p>So:</p><pre><code>\n```py\nx\n```\n</code></pre>"), is_fenced("<p>```</p>")
    (False, False)
    """
    if "```" not in answer and "~~~" not in answer:
        return False
    return not is_rendered(answer) and _FENCE.search(remove_elements(answer, "pre")) is not None


# ---- From one text to its markdown ----


def convert_text(text: str, *, typed: bool, sure: bool) -> str:
    r"""The markdown of one text of an HTML record; `typed` by a user, or written by a model and rendered.

    Texts that `is_wrapped` are markup, and if the whole record is known to be HTML (`sure`), so are all texts with a
    tag. In other texts only entities are replaced. An answer that is markdown stays as it is, with its entities, which
    are the model's own: an answer that `is_fenced`, and unless `sure` one that is no markup and has back-ticks. Raises
    RecordError as `render` does.

    >>> convert_text("<p>Use <code>a_b</code> if 1 &lt; 2:</p><ol start='3'><li>so</li></ol>", typed=False, sure=False)
    'Use `a_b` if 1 < 2:\n\n3. so'
    >>> convert_text("one<br>two", typed=True, sure=True), convert_text("one<br>two", typed=True, sure=False)
    ('one\ntwo', 'one<br>two')
    """
    if not typed and is_fenced(text):
        return text
    if not (_RENDERED_TAG.search(text) if sure else is_wrapped(text, typed=typed)):
        return text if "`" in text and not (typed or sure) else unescape_entities(text)
    html = simplify_code_blocks(_COUNTER.sub("", _COMMENT.sub("", text)))
    html = remove_elements(remove_elements(html, "svg"), "button")
    if typed and all(tag[1].lower() in _WRAPPERS for tag in TAG.finditer(html)):
        return unwrap(html)
    return render(simplify_math(html))


_COMMENT = re.compile(r"<!--[^<>]*-->")
_COUNTER = re.compile(r'<span class="flex-grow flex-shrink-0">\s*\d+\s*/\s*\d+\s*</span>')  # of regenerated answers
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")


def unescape_entities(text: str) -> str:
    """The text with each entity replaced by its character, once. Without its `;`, as in an address, it is no entity.

    >>> unescape_entities("1 &lt; 2 &amp;&amp; x&#39;s &amp;lt;")
    "1 < 2 && x's &lt;"
    >>> unescape_entities("/?a=1&copy=2&lt=3 R&D;")
    '/?a=1&copy=2&lt=3 R&D;'
    """
    return _ENTITY.sub(lambda entity: unescape(entity[0]), text) if "&" in text else text


def unwrap(html: str) -> str:
    r"""The text that a user typed, without the tags div, p, span and br: every line, space and sign is kept.

    >>> unwrap('<div class="whitespace-pre-wrap">a_b *c*\n\n\n  1. x \\ &lt;b&gt;</div>')
    'a_b *c*\n\n\n  1. x \\ <b>'
    >>> unwrap("<div>\n<p>one<br>two</p>\n<p>thr<span>ee</span></p>\n</div>")
    'one\ntwo\n\nthree'
    >>> unwrap("<div>one</div><div>two</div>"), unwrap("no tag\n  * x_y")
    ('one\ntwo', 'no tag\n  * x_y')
    """
    pieces: list[str] = []
    border = ""  # what the tags after the last piece put between it and the next
    at = 0
    for tag in [*TAG.finditer(html), None]:
        piece = html[at : tag.start() if tag else len(html)]
        at = tag.end() if tag else len(html)
        name = tag[1].lower() if tag else "div"
        if piece.strip() or (pieces and not border and piece):  # white space between elements belongs to the page
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
    """The HTML without the elements of this name, which are never nested.

    >>> remove_elements('a<button class="flex"><i></i>Copy code</button>b<button>Copy</button>', "button")
    'ab'
    >>> remove_elements("&lt;button&gt; <b>bold</b> <button>never closed", "button")
    '&lt;button&gt; <b>bold</b> <button>never closed'
    """
    return _replace_elements(html, name, lambda _: "")


def _replace_elements(html: str, name: str, replace: Callable[[str], str]) -> str:
    """The HTML with `replace(element)` for each closed element of this name, in linear time."""
    pieces = []
    at = 0
    while (start := html.find(f"<{name}", at)) >= 0 and (end := html.find(f"</{name}>", start)) >= 0:
        element_end = end + len(name) + 3
        pieces += [html[at:start], replace(html[start:element_end])]
        at = element_end
    return "".join(pieces) + html[at:] if pieces else html


_LANGUAGE = re.compile(r"(?<![\w-])language-([\w+#.-]{1,30})")
_LANGUAGE_NAME = re.compile(r"[\w+#.-]{1,30}")
_BREAK = re.compile(r"<br\b[^<>]*>")
_LAST_LINE_END = re.compile(r"\r?\n((?:</\w+>)*)\Z")


def simplify_code_blocks(html: str) -> str:
    r"""The HTML with each code block as `<pre><code>`, without colours and the bar above it: a language and Copy code.

    The language is the class `language-...` of the code, or else the text of the bar. The line end after the last line
    is removed, since the fence adds it. A `<pre>` with other text beside its code stays as it is.

    >>> bar = '<div class="bg-black"><div><span>python</span><button>Copy code</button></div>'
    >>> simplify_code_blocks(f'<pre>{bar}<div><code class="language-python"><i>if</i> x:\n</code></div></div></pre>')
    '<pre><code class="language-python">if x:</code></pre>'
    >>> simplify_code_blocks("<pre>Run <code>x</code> now</pre>")
    '<pre>Run <code>x</code> now</pre>'
    """
    return _replace_elements(html, "pre", _simplify_code_block)


def _simplify_code_block(block: str) -> str:
    start, end = block.find("<code"), block.rfind("</code>")
    opening = TAG.match(block, start) if start >= 0 else None
    if opening is None or end < opening.end():
        return block
    bar, code, rest = block[:start], block[opening.end() : end], block[end:]
    classed = _LANGUAGE.search(opening[0])
    shown = visible_text(remove_elements(bar, "button")).removesuffix("Copy code").strip()
    is_bar = "<button" in bar or "Copy code" in bar or not shown or (classed and shown == classed[1])
    if not is_bar or visible_text(rest):
        return block
    language = classed[1] if classed else shown if _LANGUAGE_NAME.fullmatch(shown) else ""
    code = TAG.sub("", _BREAK.sub("\n", _LAST_LINE_END.sub(r"\1", code)))
    name = f' class="language-{language}"' if language else ""
    return f"<pre><code{name}>{code}</code></pre>"


_KATEX = re.compile(r'<span class="katex(-display)?">')
_SPAN = re.compile(r"<(/?)span\b")
_TEX = re.compile(r'<annotation encoding="application/x-tex">([^<]*)</annotation>')


def simplify_math(html: str) -> str:
    r"""The HTML with each formula of KaTeX as TeX between dollars. A page has it as MathML, as TeX and as drawn text.

    >>> mathml = '<math><mi>x</mi><annotation encoding="application/x-tex">x_1 &lt; 2</annotation></math>'
    >>> katex = f'<span class="katex"><span>{mathml}</span><span aria-hidden="true">x1&lt;2</span></span>'
    >>> simplify_math(f"<p>If {katex}.</p>")
    '<p>If $x_1 &lt; 2$.</p>'
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
    """The end of the closing tag of the span whose opening tag ends at `at`."""
    depth = 1
    for tag in _SPAN.finditer(html, at):
        depth += -1 if tag[1] else 1
        if not depth:
            return html.find(">", tag.end()) + 1 or len(html)
    return len(html)


def _read_math(formula: str, dollars: str) -> str:
    """The TeX of a formula whose MathML lost its tags, so that its text is joined to the TeX after it.

    MathML and the drawn formula have the same characters, not always in the same order, so the rest is the TeX. Where
    they differ, the result is the drawn formula, without dollars.
    """
    mathml, _, drawn = (TAG.sub("", part) for part in formula.partition('<span class="katex-html"'))
    drawn = drawn.partition(">")[2].replace("\u200b", "")
    tex = mathml[len(drawn) :]
    return f"{dollars}{tex}{dollars}" if tex and sorted(mathml[: len(drawn)]) == sorted(drawn) else drawn or mathml
