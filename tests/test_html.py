"""HTML becomes the markdown that it renders, and nothing of a text is lost, escaped or made up on the way."""

import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from html import escape
from types import ModuleType
from typing import Any

import html_to_markdown
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ochat_train.conversations import html, markdown
from ochat_train.conversations.html import convert_text, is_rendered
from ochat_train.conversations.schema import RecordError

BAR = (
    '<div class="bg-black rounded-md mb-4"><div class="flex items-center relative text-gray-200 bg-gray-800 px-4 py-2">'
    '<span>{}</span><button class="flex ml-auto gap-2"><svg stroke="currentColor" class="h-4 w-4"><path d="M16 4h2">'
    '</path><rect x="8" y="2"></rect></svg>Copy code</button></div><div class="p-4 overflow-y-auto">'
)


def answer(value: str) -> str:
    return convert_text(f'<div class="markdown prose w-full break-words light">{value}</div>', typed=False, sure=False)


def typed(value: str) -> str:
    return convert_text(value, typed=True, sure=False)


def code_block(code: str, language: str) -> str:
    """As ChatGPT's page has it, with the colours of a few words."""
    colored = re.sub(r"\b(def|return|if)\b", r'<span class="hljs-keyword">\1</span>', escape(code, quote=False))
    classes = f"!whitespace-pre hljs language-{language}"
    return f'<pre>{BAR.format(language)}<code class="{classes}">{colored}</code></div></div></pre>'


def katex(tex: str, drawn: str, *, display: bool = False) -> str:
    mathml = f'<math><semantics><mrow>{drawn}</mrow><annotation encoding="application/x-tex">{escape(tex)}</annotation>'
    both = (
        f'<span class="katex"><span class="katex-mathml">{mathml}</semantics></math></span>'
        f'<span class="katex-html" aria-hidden="true"><span class="base">{drawn}</span></span></span>'
    )
    return f'<span class="katex-display">{both}</span>' if display else both


# ---- The rules' own examples ----


def watch_examples(module: ModuleType, name: str) -> list[tuple[Any, Any]]:
    """Runs the examples of one function; (first argument, result) of each of its calls."""
    function: Callable[..., Any] = getattr(module, name)
    calls = []

    def watched(text: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((text, function(text, *args, **kwargs)))
        return calls[-1][1]

    globs = vars(module) | {name: watched}
    for examples in doctest.DocTestFinder(recurse=False).find(function, name, globs=globs):
        assert doctest.DocTestRunner().run(examples).failed == 0
    return calls


def public_functions(module: ModuleType) -> list[str]:
    members = inspect.getmembers(module, inspect.isfunction)
    return [name for name, it in members if it.__module__ == module.__name__ and not name.startswith("_")]


RULES = [(module, name) for module in (html, markdown) for name in public_functions(module)]


@pytest.mark.parametrize(("module", "name"), RULES, ids=[name for _, name in RULES])
def test_every_rule_has_examples_that_hold_of_what_it_does_and_what_it_leaves(module: ModuleType, name: str) -> None:
    calls = watch_examples(module, name)
    acts = {result if isinstance(result, bool) else result != text for text, result in calls}
    assert len(calls) >= 2 and acts == {True, False}


# ---- A whole answer, as a page has it ----


def test_an_answer_of_a_page_becomes_markdown() -> None:
    value = (
        "<p>Here is how to <strong>sort</strong> a list in <em>Python</em>:</p><ol><li><p>Call <code>sorted</code>:</p>"
        + code_block("def f(a_list):\n\n\n    return sorted(a_list)   \n", "python")
        + "</li><li><p>Or sort in place.</p><ul><li>It is fast</li><li>It returns <code>None</code></li></ul></li></ol>"
        '<p>See <a href="https://docs.python.org/3/howto/sorting.html" target="_new">the docs</a> &amp; try it.</p>'
        "<table><thead><tr><th>call</th><th>time</th></tr></thead><tbody><tr><td>sort</td><td>1 | 2 ms</td></tr>"
        "</tbody></table><p>Its cost is " + katex(r"O(n \log n)", "O(nlogn)") + ".</p>"
    )
    assert answer(value) == (
        "Here is how to **sort** a list in *Python*:\n\n"
        "1. Call `sorted`:\n\n   ```python\n   def f(a_list):\n\n\n       return sorted(a_list)   \n   ```\n\n"
        "2. Or sort in place.\n\n   - It is fast\n   - It returns `None`\n\n"
        "See [the docs](https://docs.python.org/3/howto/sorting.html) & try it.\n\n"
        "| call | time |\n| --- | --- |\n| sort | 1 \\| 2 ms |\n\n"
        r"Its cost is $O(n \log n)$."
    )


@pytest.mark.parametrize(
    ("value", "markdown"),
    [
        ("<h1>One</h1><h3>Three</h3><hr><p>x</p>", "# One\n\n### Three\n\n---\n\nx"),
        ("<p>f<em>oo</em>b<strong>ar</strong>z</p>", "f*oo*b**ar**z"),
        ("<p>H<sub>2</sub>O, x<sup>2</sup></p>", "H<sub>2</sub>O, x<sup>2</sup>"),
        ("<p>one<br>two<br>three</p>", "one  \ntwo  \nthree"),
        ("<p>Roses are red,\nviolets are blue</p>", "Roses are red,\nviolets are blue"),
        ("<p><code>a`b</code> and <code>``</code></p>", "``a`b`` and ` `` `"),
        ('<ol start="3"><li>c</li><li>d<ol><li>e</li></ol></li></ol>', "3. c\n4. d\n   1. e"),
        ("<ol><li>a</li></ol><p>x</p><ol start='2'><li>b</li></ol>", "1. a\n\nx\n\n2. b"),
        ("<blockquote><p>q</p><blockquote><p>r</p></blockquote><p>s</p></blockquote>", "> q\n>\n> > r\n>\n> s"),
        ("<blockquote><ul><li>a</li></ul><p>b</p></blockquote><blockquote>c</blockquote>", "> - a\n>\n> b\n\n> c"),
        ("<blockquote><pre><code>a\n\n b\n</code></pre></blockquote>", "> ```\n> a\n>\n>  b\n> ```"),
        ('<p><img src="https://a.b/c.png" alt="a cat"></p>', "![a cat](https://a.b/c.png)"),
        ('<p><img src="data:image/png;base64,AAAA" alt="a cat"></p>', "a cat"),
        ('<p><a href="https://a.b/c_d">https://a.b/c_d</a></p>', "<https://a.b/c_d>"),
        ('<p><a href="https://a.b/c_(d)">[1]</a></p>', "[[1]](https://a.b/c_(d))"),
        ("<p>&lt;b&gt; &amp;lt; &amp;amp; &quot;x&quot; &#39;</p>", '<b> &lt; &amp; "x" \''),
        ("<p>10&nbsp;km, 10\u00a0km, 漢字 한국어 🙂👩‍💻 é</p>", "10\u00a0km, 10\u00a0km, 漢字 한국어 🙂👩‍💻 é"),
        ("<table><tr><th>a</th></tr><tr><td>b<br>c</td></tr></table>", "| a |\n| --- |\n| b<br>c |"),
        ('<div class="x"><button>Regenerate</button></div><p>x</p>', "x"),
        ("<p>a<!-- -->b</p>", "ab"),
        ('<div><span class="flex-grow flex-shrink-0">1 / 2</span></div><p>x</p>', "x"),
        ("<p><span>3 / 4</span> of them</p>", "3 / 4 of them"),
    ],
)
def test_elements_of_an_answer(value: str, markdown: str) -> None:
    assert answer(value) == markdown


# ---- Code ----


def test_the_fence_is_longer_than_those_in_the_code() -> None:
    assert answer(code_block("```python\nx\n```\n", "markdown")) == "````markdown\n```python\nx\n```\n````"


@pytest.mark.parametrize("language", ["c++", "c#", "objective-c", "plaintext"])
def test_the_fence_names_the_language(language: str) -> None:
    assert answer(code_block("x\n", language)) == f"```{language}\nx\n```"


def test_a_bar_whose_buttons_were_sanitized_away_goes_too() -> None:
    bar = '<div class="bg-black mb-4 rounded-md"><div class="flex"><span>sql</span><svg></svg>Copy code</div><div>'
    assert answer(f'<pre>{bar}<code class="hljs language-sql">SELECT 1;\n</code></div></div></pre>') == (
        "```sql\nSELECT 1;\n```"
    )
    assert answer("<pre><div>Copy code</div><code>x\n</code></pre>") == "```\nx\n```"


def test_text_beside_code_in_one_block_stays() -> None:
    assert answer("<pre><code>x</code> now</pre>") == "```\nx now\n```"
    assert answer("<pre>Run <code>x</code></pre>") == "```\nRun x\n```"


def test_code_that_talks_about_buttons_stays() -> None:
    code = '<button>Copy code</button> <span class="katex">\n1 / 2 &nbsp; <!-- x --> \\n\n'
    assert answer(code_block(code, "html")) == f"```html\n{code}```"


any_line = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029").filter(
        lambda character: character not in markdown._STAND_INS
    ),
    max_size=12,
)


@given(
    st.lists(st.one_of(any_line, st.sampled_from(["", "    ", "\t", "```", "# x", "1. a\\_b", "> <b>"])), min_size=1)
)
def test_code_stays_byte_for_byte(lines: list[str]) -> None:
    code = "\n".join(lines)
    if not code.strip():
        return
    markdown = answer(f'<pre><code class="language-py">{escape(code)}\n</code></pre>')
    fence = markdown[: markdown.index("p")]
    assert set(fence) == {"`"} and fence not in code
    assert markdown == f"{fence}py\n{code}\n{fence}"


# ---- Formulas ----


def test_a_formula_is_its_tex_once() -> None:
    assert answer(f"<p>If {katex('x_1 < y^{2}', 'x1&lt;y2')}, so</p>") == "If $x_1 < y^{2}$, so"
    tex = "\\begin{cases} a & b \\\\\n* & c \\end{cases}"
    assert answer(f"<p>{katex(tex, 'ab', display=True)}</p>") == f"$${tex}$$"


def test_a_formula_without_mathml_tags_is_its_tex_if_that_can_be_told() -> None:
    def sanitized(text: str, drawn: str) -> str:
        return f'<span class="katex"><span class="katex-mathml">{text}</span>{drawn}</span> ok'

    drawn = '<span class="katex-html" aria-hidden="true"><span>2</span><span>1\u200b</span></span>'
    assert answer("<p>" + sanitized(r"12\frac{1}{2}", drawn) + "</p>") == r"$\frac{1}{2}$ ok"
    assert answer("<p>" + sanitized("13", drawn) + "</p>") == "21 ok"


# ---- Nothing is escaped ----

PRINTABLE = [chr(code) for code in range(33, 127)] + ["é", "漢"]
a_line = st.text([*PRINTABLE, *(" #*-+>_`.1\\" * 4)], min_size=1, max_size=14).map(lambda text: " ".join(text.split()))


@given(
    a_line.filter(bool), st.sampled_from(["<p>{}</p>", "<h3>{}</h3>", "<ul><li>{}</li></ul>", "<ol start=7><li><p>{}"])
)
def test_a_line_of_prose_stays_as_it_was_written(line: str, element: str) -> None:
    begin = {"h": "### ", "u": "- ", "o": "7. "}.get(element[1], "")
    assert answer(element.format(escape(line))) == begin + line


def test_a_backslash_stays_and_none_is_added() -> None:
    lines = [
        "1\\. x",
        "\\# y",
        "\\",
        "a\\_b",
        "C:\\new",
        "1. x",
        "# y",
        "- z",
        "+ z",
        "> q",
        "1) x",
        "---",
        "```",
        "~~~",
    ]
    assert answer("".join(f"<p>{escape(line)}</p>" for line in lines)) == "\n\n".join(lines)


# ---- What users typed ----

DIV = '<div class="min-h-[20px] flex flex-col items-start gap-4 whitespace-pre-wrap">{}</div>'


@pytest.mark.parametrize("element", ["{}", DIV, "<div><p>{}</p></div>", "<p>{}</p>", "<span>{}</span>"])
@given(text=st.text(st.sampled_from([*PRINTABLE, " ", "\n", "\t", "\r", "\u00a0", "&", "<"]), min_size=1))
def test_typed_text_stays_byte_for_byte(element: str, text: str) -> None:
    if text.strip():
        assert typed(element.format(escape(text))) == text


def test_typed_tags_without_an_element_around_them_are_words() -> None:
    for text in ("Is <br> a tag?", "<p> is what?", "Fix <b>this</b>\n\n  <ul>", "<table><tr><td>1</td></tr></table>"):
        assert typed(text) == text


def test_typed_text_with_more_than_plain_elements_is_converted() -> None:
    assert typed("<div><p>Use <code>a_b</code></p><ul><li>1. x</li></ul></div>") == "Use `a_b`\n\n- 1. x"
    assert (
        typed('<div><button class="x"><svg><path></path></svg>Edit</button>' + DIV.format("a\n  b") + "</div>")
        == "a\n  b"
    )


def test_an_answer_that_is_no_markup_is_only_freed_of_entities() -> None:
    assert convert_text("a &lt; b\n\n\n* <div> x_", typed=False, sure=False) == "a < b\n\n\n* <div> x_"


FENCED = "<details>\n<summary>The code</summary>\n\n```py\na  =  1\n\n\nb\n```\n\n`&lt;b&gt;` &amp; more</details>"


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("text", [FENCED, FENCED.replace("```", "~~~"), "<b>x</b>\n1. y\n   ```\n   <pre>\n\n\n   ```"])
def test_an_answer_with_a_fence_is_markdown_though_it_begins_with_a_tag(text: str, sure: bool) -> None:
    assert convert_text(text, typed=False, sure=sure) == text


def test_a_fence_in_code_of_a_rendered_answer_is_no_mark_of_markdown() -> None:
    code = "<p>x</p><pre><code>a\n```\n</code></pre>"
    assert convert_text(code, typed=False, sure=False) == answer(code) == "x\n\n````\na\n```\n````"
    assert answer("<p>&lt;\n```\n</p>") == "<\n```"
    assert typed(DIV.format("```\n&lt;b&gt;\n```")) == "```\n<b>\n```"


def test_entities_of_an_answer_with_back_ticks_stay_unless_the_record_is_surely_html() -> None:
    text = "Write `&lt;b&gt;` &amp; so on"
    assert convert_text(text, typed=False, sure=False) == text
    assert convert_text(text, typed=False, sure=True) == convert_text(text, typed=True, sure=False)
    assert typed(text) == "Write `<b>` & so on"


# ---- The marks of ChatGPT ----


def test_only_chatgpts_own_marks_make_a_record_html() -> None:
    assert is_rendered('<div class="markdown prose w-full break-words dark:prose-invert light"><p>x')
    assert is_rendered("\n<div data-x='1' class='light markdown'>Hi</div>")
    assert is_rendered(f"<div><p>x</p>{code_block('x', 'js')}")
    for text in ("<p>Hi</p>", "<div><p>Hi</p></div>", '<div class="markdownify">', '<p class="markdown">', "a < b", ""):
        assert not is_rendered(text)
    assert not is_rendered('Put `<div class="markdown">` around it')


# ---- Refusals ----


@pytest.mark.parametrize("tag", ["div", "b", "span", "blockquote", "ul><li", "OL><LI", "table><tr><td", "x-y"])
@pytest.mark.parametrize("closed", [True, False])
def test_deep_nesting_is_refused_rather_than_lost(tag: str, closed: bool) -> None:
    close = "".join(f"</{name}>" for name in reversed(tag.split("><"))) if closed else ""
    for depth in (200, 10_000):
        with pytest.raises(RecordError) as error:
            answer(f"<p>seen</p>{f'<{tag}>' * depth}lost?{close * depth}")
        assert error.value.reason == "html_too_deep"


def test_usual_nesting_is_not_refused() -> None:
    assert answer("<ul><li>" * 8 + "x") == "- " * 8 + "x"
    assert answer("<div>" * 60 + "<p>x</p>") == "x"
    assert answer("<ul><li>x</li></ul>" * 50).count("- x") == 50
    assert answer("<blockquote>x</blockquote>" * 50).count("> x") == 50


@pytest.mark.parametrize(
    "value",
    [
        "<table><tr><td colspan='1000'>x</td></tr></table>",
        "<TABLE><TR><TH ROWSPAN=100>x</TABLE>",
        "<p>" + "".join(markdown._STAND_INS) + "</p>",
        "<p>\ud800</p>",
        "\0" * 1000 + "x",
        "<![CDATA[ x ",
    ],
)
def test_what_the_library_cannot_convert_is_refused(value: str) -> None:
    with pytest.raises(RecordError) as error:
        answer(value)
    assert error.value.reason == "html_not_converted" and error.value.detail


def test_a_panic_of_the_library_is_a_refusal_and_an_interrupt_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        pass

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(html_to_markdown, "convert", fail)
    problem: BaseException = Panic("at the disco")
    with pytest.raises(RecordError, match="html_not_converted: Panic: at the disco"):
        answer("x")
    problem = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        answer("x")


def test_text_that_the_library_drops_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_convert", lambda _: " \n")
    with pytest.raises(RecordError, match="html_not_converted"):
        answer("<p>x</p>")
    assert answer("<p> </p>") == ""


def test_noise_alone_becomes_empty() -> None:
    assert answer("<div><button>Copy code</button></div>") == ""


BOMBS = {
    "tags": '"<" * 150_000',
    "opened": '"<a b" * 50_000',
    "comments": '"<!--" * 50_000',
    "entities": '"&" * 150_000 + "&lt" * 50_000',
    "back-ticks": '"<code>" + "`" * 150_000 + "</code>" + "<code>`</code>" * 20_000',
    "code blocks": '"<pre>" * 50_000 + "</pre>" + "<pre><code>" * 30_000 + "</code></pre>"',
    "code lines": '"<pre><code>" + "\\n</i>" * 30_000 + "x</code></pre>"',
    "formulas": """'<span class="katex">' * 20_000 + "</span>" * 20_000""",
    "counters": """'<span class="flex-grow flex-shrink-0">' * 10_000 + "1" * 10_000""",
    "buttons": '"<button>" * 50_000 + "<svg>" * 50_000',
    "attribute": """'<a href="' + "x" * 2_000_000 + '">y</a>'""",
    "attributes": '"<a " + "x=y " * 100_000 + ">y</a>"',
    "classes": """'<div ' + 'class="a" ' * 50_000 + ">x</div>" """,
    "closed": '"</div>" * 50_000',
    "crossed": '"<b><i>" * 20_000 + "</b></i>" * 20_000',
    "unclosed": '"<p><b>" * 10_000 + "x"',
    "deep": '"".join(f"<{tag}>" * 20_000 for tag in ("div", "b", "ul", "table", "blockquote", "select", "svg"))',
    "backslashes": '"<p>1. \\\\\\\\</p>" * 20_000 + "<p>" + "1 " * 50_000 + "\\\\\\\\</p>"',
    "nulls": '"\\0" * 50_000 + "<p>x</p>" * 100',
    "megabytes": '"<p>hello world, this is text</p>" * 30_000',
}


def test_no_input_crashes_the_process_or_takes_more_than_linear_time() -> None:
    script = (
        "from ochat_train.conversations.html import convert_text, is_rendered\n"
        "from ochat_train.conversations.schema import RecordError\n"
        "import sys, time\n"
        "for bomb in sys.argv[1:]:\n"
        "    started = time.process_time()\n"
        "    for value in (text := eval(bomb), f'<div class=\"markdown\">{text}</div>'):\n"
        "        is_rendered(value)\n"
        "        for typed in (True, False):\n"
        "            try:\n"
        "                convert_text(value, typed=typed, sure=True)\n"
        "            except RecordError:\n"
        "                pass\n"
        "    print(time.process_time() - started)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *BOMBS.values()], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    seconds = dict(zip(BOMBS, map(float, result.stdout.split()), strict=True))
    assert {name: second for name, second in seconds.items() if second > 8} == {}


@given(st.text("<>/abdp r\"'=&;!-`\\\u00a0\ufdd0\ufdd1", max_size=40))
def test_any_text_is_converted_or_refused(text: str) -> None:
    for value in (text, f"<div>{text}</div>", f"<pre><code>{text}</code></pre>", f'<span class="katex">{text}'):
        for by_user in (True, False):
            try:
                convert_text(value, typed=by_user, sure=True)
            except RecordError as error:
                assert error.reason in ("html_not_converted", "html_too_deep")


def test_a_record_without_html_never_imports_the_library() -> None:
    script = (
        "import sys\nfrom ochat_train.conversations.html import convert_text\n"
        "convert_text('a &lt; b', typed=True, sure=False)\nassert 'html_to_markdown' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
