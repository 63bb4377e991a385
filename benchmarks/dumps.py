"""Dumps to measure with: invented ShareGPT conversations of any number, the same ones for the same seed and Python.

The words are real: sentences of Python's own manual and docstrings, and functions of its standard library, which every
Python brings along. They are cut and put together anew, so that no text comes twice unless it is meant to. As in
real texts, one word in six is new: an identifier, a path, a number, a name or a quotation that did not come before.
"""

import ast
import html
import math
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import orjson

# Of all records; the rest are plain conversations.
KINDS = {
    "exact duplicate": 0.05,
    "earlier snapshot": 0.08,
    "near-duplicate": 0.03,
    "refusal": 0.02,
    "other language": 0.03,
    "broken": 0.01,
}
GPT4_SHARE = 0.25
MAX_EXCHANGES = 5  # of a question and an answer
MEDIAN_CHARS, SIGMA, MAX_CHARS = 2_900, 0.95, 70_000  # of a conversation: lognormal, and cut off at about 20k tokens
QUESTION_SHARE = 0.2  # of the characters
NUM_REMEMBERED = 4096  # earlier conversations that may come again
CHANGED_WORDS = 0.01  # of a near-duplicate
NEW_WORDS = 0.2  # of the words of a text; those of copies came before, so that 16 % of all words are new

Message = tuple[str, str]  # role, text


class Block(NamedTuple):
    """A piece of a text: "paragraph", "heading", "bullets", "numbers", "code" or "table", with its lines."""

    kind: str
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Material:
    """English sentences, Python functions, and the words of letters in the sentences."""

    sentences: list[str]
    functions: list[str]
    words: list[str]


def write_dump(path: Path, num_conversations: int, *, seed: int = 0) -> Counter[str]:
    """Write a JSON array of that many records; how many of each kind."""
    counts = Counter({kind: 0 for kind in ("plain", *KINDS)})
    with path.open("wb") as file:
        for number, (kind, record) in enumerate(_records(num_conversations, seed)):
            counts[kind] += 1
            file.write((b",\n" if number else b"[\n") + orjson.dumps(record))
        file.write(b"\n]\n")
    return counts


def html_answers(num_answers: int, *, seed: int = 0) -> list[str]:
    """Answers as ChatGPT's pages hold them, with highlighted code, "Copy code" buttons, lists and tables."""
    dice = _Dice(seed)
    return [_to_html(_draw_blocks(dice, _draw_chars(dice) // MAX_EXCHANGES)) for _ in range(num_answers)]


class _Dice:
    """Random numbers, drawn many at a time, since numpy takes as long for one as for hundreds."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._uniform = self._draw()

    def uniform(self) -> float:
        """From 0 up to 1."""
        return next(self._uniform)

    def below(self, end: int) -> int:
        """A whole number from 0 up to `end`."""
        return int(next(self._uniform) * end)

    def pick(self, options: list[Any] | tuple[Any, ...]) -> Any:
        """One of `options`."""
        return options[int(next(self._uniform) * len(options))]

    def normal(self) -> float:
        """Of mean 0 and standard deviation 1."""
        return float(self._generator.standard_normal())

    def _draw(self) -> Iterator[float]:
        while True:
            yield from self._generator.random(1 << 14).tolist()


# ---- Material ----

_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z])")
_NUM_CROSSED = 50_000


@cache
def read_material() -> Material:
    """Sentences and functions of this Python's manual and library."""
    paragraphs = [paragraph for topic in sorted(topics) for paragraph in topics[topic].split("\n\n")]
    functions = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        source = file.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraphs += (ast.get_docstring(node) or "").split("\n\n")
            if isinstance(node, ast.FunctionDef) and 4 <= (node.end_lineno or 0) - node.lineno <= 40:
                functions.append(textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])))
    sentences = [
        sentence
        for paragraph in paragraphs
        if "::=" not in paragraph and ">>>" not in paragraph
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
        if sentence.count(" ") > 6 and len(sentence) <= 300
    ]
    words = sorted({word for sentence in sentences for word in sentence.split() if word.isalpha()})
    return Material(sentences + _cross(sentences), functions, words)


def _cross(sentences: list[str]) -> list[str]:
    """New sentences: the first words of one, and the last of another."""
    dice = _Dice(0)
    crossed = []
    for _ in range(_NUM_CROSSED):
        first, second = dice.pick(sentences).split(" "), dice.pick(sentences).split(" ")
        crossed.append(" ".join(first[: 1 + dice.below(len(first))] + second[dice.below(len(second)) :]))
    return crossed


_SYLLABLES = tuple(
    first + vowel + last for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in ("", "n", "r", "l")
)

# ---- Texts ----

_BLOCK_KINDS = (*["paragraph"] * 11, *["code"] * 2, *["bullets"] * 2, "numbers", "heading", "table")


def _draw_blocks(dice: _Dice, num_chars: int) -> list[Block]:
    """Blocks of about `num_chars` in all, the first a paragraph."""
    material = read_material()
    blocks: list[Block] = []
    while num_chars > 0:
        kind = dice.pick(_BLOCK_KINDS) if blocks and num_chars > 300 else "paragraph"
        if kind == "code":
            lines = dice.pick(material.functions).split("\n")
        elif kind == "table":
            lines = [" | ".join(dice.pick(material.sentences)[:20].split()) for _ in range(2 + dice.below(4))]
        else:
            lines, num_left = [], 1 + dice.below(2 if kind == "heading" else 6)
            while num_left and num_chars > sum(map(len, lines)):
                lines.append(dice.pick(material.sentences))
                num_left -= 1
            if kind == "heading":
                lines = [lines[0][:60]]
        blocks.append(Block(kind, lines))
        num_chars -= sum(map(len, lines)) + 2
    return blocks


def _to_markdown(blocks: list[Block]) -> str:
    return "\n\n".join(map(_block_to_markdown, blocks))


def _block_to_markdown(block: Block) -> str:
    kind, lines = block
    if kind == "code":
        return "\n".join(["```python", *lines, "```"])
    if kind == "bullets":
        return "\n".join([f"- {line}" for line in lines])
    if kind == "numbers":
        return "\n".join([f"{number}. {line}" for number, line in enumerate(lines, start=1)])
    if kind == "heading":
        return f"## {lines[0]}"
    if kind == "table":
        rows = [line.split(" | ") for line in lines]
        width = max(map(len, rows))
        cells = [row + [""] * (width - len(row)) for row in rows]
        return "\n".join([f"| {' | '.join(row)} |" for row in [cells[0], ["---"] * width, *cells[1:]]])
    return " ".join(lines)


_KEYWORD = re.compile(r"\b(def|return|if|else|for|in|while|try|except|raise|import|from|not|and|or|is|None|self)\b")
_BUTTON = (
    '<button class="flex ml-auto gap-2"><svg stroke="currentColor" fill="none" stroke-width="2" viewBox="0 0 24 24" '
    'class="h-4 w-4" height="1em" width="1em"><path d="M16 4h2a2 2 0 0 1 2 2v14"></path></svg>Copy code</button>'
)


def _to_html(blocks: list[Block]) -> str:
    body = "\n".join(map(_block_to_html, blocks))
    return f'<div class="markdown prose w-full break-words dark:prose-invert light">{body}</div>'


def _block_to_html(block: Block) -> str:
    kind, lines = block.kind, [html.escape(line) for line in block.lines]
    if kind == "code":
        code = _KEYWORD.sub(r'<span class="hljs-keyword">\1</span>', "\n".join(lines))
        return (
            '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center relative px-4 py-2 text-xs">'
            f'<span class="">python</span>{_BUTTON}</div><div class="p-4 overflow-y-auto">'
            f'<code class="!whitespace-pre hljs language-python">{code}\n</code></div></div></pre>'
        )
    if kind in ("bullets", "numbers"):
        tag = "ul" if kind == "bullets" else "ol"
        return f"<{tag}>{''.join(f'<li><p>{line}</p></li>' for line in lines)}</{tag}>"
    if kind == "heading":
        return f"<h2>{lines[0]}</h2>"
    if kind == "table":
        head, *rows = [line.split(" | ") for line in lines]
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        top = "".join(f"<th>{cell}</th>" for cell in head)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    words = " ".join(lines).split(" ")
    if len(words) > 12:
        words[3], words[8] = f"<strong>{words[3]}</strong>", f"<code>{words[8]}</code>"
    return f"<p>{' '.join(words)}</p>"


# ---- Records ----


def _records(num_records: int, seed: int) -> Iterator[tuple[str, Any]]:
    dice = _Dice(seed)
    remembered: list[list[Message]] = []
    edges = np.cumsum(list(KINDS.values())).tolist()
    for number in range(num_records):
        draw = dice.uniform()
        kind = next((name for name, edge in zip(KINDS, edges, strict=True) if draw < edge), "plain")
        if not remembered:
            kind = "plain"
        messages = _draw_messages(dice, kind, remembered)
        if kind == "plain":
            if len(remembered) < NUM_REMEMBERED:
                remembered.append(messages)
            else:
                remembered[dice.below(NUM_REMEMBERED)] = messages
        record = {
            "id": f"{dice.below(1 << 40):010x}_{number}",
            "model": "Model: GPT-4" if dice.uniform() < GPT4_SHARE else "Default",
            "conversations": [{"from": role, "value": text} for role, text in messages],
        }
        yield kind, _break(dice, record) if kind == "broken" else record


def _draw_messages(dice: _Dice, kind: str, remembered: list[list[Message]]) -> list[Message]:
    if kind == "exact duplicate":
        return list(dice.pick(remembered))
    if kind == "near-duplicate":
        return [(role, _change_words(dice, text)) for role, text in dice.pick(remembered)]
    if kind == "earlier snapshot":
        whole = dice.pick(remembered)
        return list(whole[: 2 * (1 + dice.below(max(1, len(whole) // 2 - 1)))])
    if kind == "other language":
        sentences = dice.pick(_OTHER_LANGUAGES)
        return [
            (role, " ".join([dice.pick(sentences) for _ in range(2 + dice.below(8))])) for role in ("human", "gpt") * 2
        ]
    messages = _draw_conversation(dice)
    if kind == "refusal":
        messages[1] = ("gpt", f"{dice.pick(_REFUSALS)} {dice.pick(read_material().sentences)}")
    return messages


def _draw_conversation(dice: _Dice) -> list[Message]:
    num_chars, num_exchanges = _draw_chars(dice), 1 + dice.below(MAX_EXCHANGES)
    messages = []
    for _ in range(num_exchanges):
        for role, share in (("human", QUESTION_SHARE), ("gpt", 1 - QUESTION_SHARE)):
            size = int(num_chars * share / num_exchanges * (0.4 + 1.2 * dice.uniform()))
            messages.append((role, _add_new_words(dice, _to_markdown(_draw_blocks(dice, max(1, size))))))
    return messages


def _add_new_words(dice: _Dice, text: str) -> str:
    """The text with new words in place of NEW_WORDS of its own; its lines stay."""
    words = text.split(" ")
    places = [place for place, word in enumerate(words) if word.isalpha()]  # marks of lists, fences, line ends stay
    for _ in range(min(round(NEW_WORDS * len(words)), len(places))):
        place = places.pop(dice.below(len(places)))
        words[place] = _invent_word(dice, words[place])
    return " ".join(words)


def _invent_word(dice: _Dice, word: str) -> str:
    """What hardly came before: half of the time made of known words, as identifiers and paths are."""
    known = [word, *(dice.pick(read_material().words) for _ in range(2))]
    number = dice.below(10 ** (1 + dice.below(7)))
    forms = (
        lambda: "_".join(known[: 2 + dice.below(2)]),
        lambda: f"`{known[0]}.{known[1]}({number})`",
        lambda: "/".join(["", *known]),
        lambda: known[0] + known[1].title() + dice.pick(("", "s", "()", ",", ".")),
        lambda: f"{number:,}{dice.pick(('', '.', ',', ' %', ')', 'px'))}",
        lambda: f"{dice.below(100)}.{number}",
        lambda: (
            "".join(dice.pick(_SYLLABLES) for _ in range(2 + dice.below(3))).title() + dice.pick(("", ",", "'s", "."))
        ),
        lambda: f"{dice.pick(('“', '(', '**', chr(34)))}{known[0]}-{known[1]}{dice.pick(('”', ')', '**', chr(34)))}",
    )
    invented: str = dice.pick(forms)()
    return invented


def _draw_chars(dice: _Dice) -> int:
    return int(min(MAX_CHARS, MEDIAN_CHARS * math.exp(SIGMA * dice.normal())))


def _change_words(dice: _Dice, text: str) -> str:
    words = text.split(" ")
    for _ in range(max(1, int(CHANGED_WORDS * len(words)))):
        words[dice.below(len(words))] = dice.pick(("perhaps", "later", "colour", "seven", "inside", "quickly"))
    return " ".join(words)


def _break(dice: _Dice, record: dict[str, Any]) -> Any:
    """One of the forms in which dumps hold nothing to train on, or too much."""
    turns = record["conversations"]
    form = dice.below(6)
    if form == 0:
        return record | {"conversations": []}
    if form == 1:
        return record | {"conversations": turns[:1]}
    if form == 2:
        return record | {"conversations": [{"from": "narrator", "value": turns[0]["value"]}, *turns[1:]]}
    if form == 3:
        return record | {"conversations": [{"from": "human", "value": None}, *turns[1:]]}
    if form == 4:
        return record | {"conversations": turns[1:]}  # begins with an answer
    return record | {"conversations": [turns[0], turns[0], *turns[1:], {"from": "human", "value": "  "}]}


_REFUSALS = (
    "I'm sorry, but as an AI language model, I cannot help with that.",
    "As an AI language model, I don't have personal opinions or feelings.",
    "I apologize, but I cannot fulfill this request.",
    "I'm sorry, but I can't assist with that request.",
)

_OTHER_LANGUAGES = (
    (
        "Kannst du mir bitte erklären, wie ich diese Tabelle nach dem Datum sortiere?",
        "Natürlich, zuerst musst du die Spalte in ein echtes Datum umwandeln.",
        "Danach genügt ein einziger Aufruf, und die ältesten Einträge stehen oben.",
        "Wenn Werte fehlen, solltest du sie vorher entfernen oder ersetzen.",
        "Achte außerdem darauf, dass die Zeitzonen überall übereinstimmen.",
        "Vielen Dank, das hat mir sehr geholfen, jetzt läuft mein Programm.",
    ),
    (
        "Pourrais-tu m'expliquer comment trier ce tableau selon la date ?",
        "Bien sûr, il faut d'abord convertir la colonne en véritables dates.",
        "Ensuite, un seul appel suffit pour que les plus anciennes soient en haut.",
        "S'il manque des valeurs, il vaut mieux les enlever ou les remplacer avant.",
        "Vérifie aussi que les fuseaux horaires sont partout les mêmes.",
        "Merci beaucoup, cela m'a vraiment aidé, mon programme fonctionne maintenant.",
    ),
    (
        "¿Podrías explicarme cómo se ordena esta tabla según la fecha?",
        "Claro que sí, primero tienes que convertir la columna en fechas verdaderas.",
        "Después basta una sola llamada para que las más antiguas queden arriba.",
        "Si faltan valores, conviene quitarlos o sustituirlos antes de seguir.",
        "Comprueba también que los husos horarios coincidan en todas partes.",
        "Muchas gracias, me ha servido de mucho y el programa ya funciona.",
    ),
    (
        "Você poderia me explicar como ordenar esta tabela pela data?",
        "Claro, primeiro você precisa converter a coluna em datas de verdade.",
        "Depois basta uma única chamada para que as mais antigas fiquem no alto.",
        "Se faltarem valores, é melhor removê-los ou substituí-los antes.",
        "Confira também se os fusos horários são iguais em toda parte.",
        "Muito obrigado, isso ajudou bastante e o programa já funciona.",
    ),
    (
        "Объясни, пожалуйста, как отсортировать эту таблицу по дате?",
        "Конечно, сначала нужно превратить столбец в настоящие даты.",
        "Потом хватит одного вызова, и самые старые записи окажутся наверху.",
        "Если каких-то значений нет, их лучше заранее удалить или заменить.",
        "Проверь ещё, чтобы часовые пояса везде совпадали.",
        "Большое спасибо, это очень помогло, теперь программа работает.",
    ),
    (
        "请你解释一下怎样按照日期给这张表格排序好吗。",
        "当然可以。首先要把这一列转换成真正的日期。",
        "然后只需要调用一次函数。最早的记录就会排在最上面。",
        "如果有缺失的数值。最好事先删除或者替换它们。",
        "还要检查所有的时区是否一致。",
        "非常感谢。这对我帮助很大。现在程序可以运行了。",
    ),
    (
        "この表を日付の順に並べ替える方法を説明していただけますか。",
        "もちろんです。まず列を本当の日付に変換する必要があります。",
        "その後は一度呼び出すだけで、いちばん古い記録が上に来ます。",
        "値が欠けているときは、先に取り除くか置き換えるほうがよいでしょう。",
        "時間帯がすべて同じかどうかも確かめてください。",
        "ありがとうございます。とても助かりました。",
    ),
)
