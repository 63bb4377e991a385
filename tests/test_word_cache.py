"""The ids of texts by their words equal those of the tokenizers library, and nothing is cut that is not proved."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from ochat_train.tokens.tokenizer import TextEncoder
from ochat_train.tokens.word_cache import find_cuts
from tests.small_tokenizers import write_base

LLAMA2 = Path(__file__).resolve().parents[2] / "shared/fixtures/llama2-tokenizer/tokenizer.json"
PIECES = (
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\u2581", "\x00", "\x1c", "\x1f", "\x7f", "\x85", "\u00a0"),
    *(
        "\u1680",
        "\u2009",
        "\u2028",
        "\u3000",
        "\u200b",
        "\ufeff",
        "\u0301",
        "e\u0301",
        "\u212b",
        "\u0378",
        "\U000e0fff",
    ),
    *("\U0001f469\u200d\U0001f4bb", "\u6f22\u5b57", "\ud55c\uad6d", "gr\u00f6\u00dfer", "\u017f", "word", "Word", "a"),
    *(
        "don't",
        "'LL",
        "'s",
        "'",
        "1",
        "1234",
        ".",
        ",",
        "...",
        "!",
        "/",
        "</",
        ">",
        "_",
        "(",
        "self.rows[0]",
        "x" * 70,
        "ab" * 150,
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<tool_call>", "<|end|>"),
)
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=14).map("".join)
# Of regexes as their makers publish them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
TOOL_CALL = AddedToken("<tool_call>", normalized=False)


def split(*regexes: str) -> dict[str, Any]:
    """A pre-tokenizer as tokenizer.json has it."""
    ways = [{"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False} for one in regexes]
    return {"type": "Sequence", "pretokenizers": [*ways, BYTES]}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """tokenizer.json of each kind."""
    folder = tmp_path_factory.mktemp("bases")
    kinds = ("llama2", "yi", "gpt2", "gpt2_prefix", "metaspace")
    read = {kind: json.loads((write_base(folder / kind, kind) / "tokenizer.json").read_text()) for kind in kinds}
    for kind in ("llama2", "yi"):  # whose small vocabularies have tokens of several words
        model = read[kind]["model"]
        kept = [pair for pair in model["merges"] if "\u2581" not in "".join(pair).lstrip("\u2581")]
        read[kind]["model"] = model | {"merges": kept}
    read["llama2, real"] = json.loads(LLAMA2.read_text())
    read["llama3"] = read["gpt2"] | {"pre_tokenizer": split(LLAMA3)}
    read["gpt4o"] = read["gpt2"] | {"pre_tokenizer": split(GPT4O)}
    read["nemo"] = read["gpt2"] | {"pre_tokenizer": split(NEMO)}
    read["deepseek"] = read["gpt2"] | {"pre_tokenizer": split(*DEEPSEEK)}
    # A token that is a word, but is not made by merges.
    model = read["llama3"]["model"]
    vocabulary = model["vocab"] | {"\u0120Word": len(model["vocab"]) + 100, "'": len(model["vocab"]) + 101}
    read["llama3, whole words"] = read["llama3"] | {"model": model | {"ignore_merges": True, "vocab": vocabulary}}
    qwen = Tokenizer.from_str(json.dumps(read["llama3"] | {"normalizer": {"type": "NFC"}}))
    qwen.add_tokens([TOOL_CALL])
    read["qwen"] = json.loads(qwen.to_str())
    each_digit = {"type": "Digits", "individual_digits": True}
    steps = [each_digit, BYTES | {"use_regex": True}]
    read["command-r"] = read["gpt2"] | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    return read


KINDS = (
    *("llama2, real", "llama2", "yi", "gpt2", "llama3", "llama3, whole words", "gpt4o", "nemo", "deepseek", "qwen"),
    "command-r",
)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(kind: str, described: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(described[kind])
    library = Tokenizer.from_str(text)
    library.encode_special_tokens = True
    assert find_cuts(described[kind]) is not None
    encoder = TextEncoder(text, {})  # that knows more words with every example

    @given(st.lists(HOSTILE, max_size=4))
    def check(texts: list[str]) -> None:
        expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in encoder.encode_texts(texts)] == expected

    check()


def test_no_cut_without_a_proof(described: dict[str, dict[str, Any]]) -> None:
    def changed(kind: str, part: str, **values: object) -> dict[str, Any]:
        return described[kind] | {part: (described[kind][part] or {}) | values}

    merges = described["llama2"]["model"]["merges"]
    many = [[letter, "\u2581b"] for letter in "abcdefghi"]
    unknown = described["gpt2"] | {"pre_tokenizer": split(LLAMA3 + "|a b")}
    assert all(
        find_cuts(description) is None
        for description in (
            *(described["metaspace"], described["gpt2_prefix"], unknown),
            *(changed("llama2", "model", **values) for values in ({"merges": [*merges, *many]}, {"dropout": 0.1})),
            *(changed("yi", "model", **values) for values in ({"byte_fallback": False}, {"ignore_merges": True})),
            changed("llama2", "model", merges=[*merges, ["<0x0A>", "a"]]),
            described["gpt2"] | {"normalizer": {"type": "NFKC"}},
            changed("gpt2", "model", type="WordPiece"),
        )
    )


@pytest.mark.parametrize("way", ["lstrip", "rstrip", "single_word", "normalized"])
def test_texts_with_tokens_that_look_around_are_left_to_the_library(
    way: str, described: dict[str, dict[str, Any]]
) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(described["qwen"]))
    tokenizer.add_tokens([AddedToken("<a>", **{"normalized": False, way: True})])
    assert find_cuts(json.loads(tokenizer.to_str())) is None


def test_a_token_of_several_words_is_found(described: dict[str, dict[str, Any]]) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(described["llama3"]))
    tokenizer.add_tokens([AddedToken(content, normalized=False) for content in ("a b", "a", "b c", "\n\n ")])
    tokenizer.add_special_tokens([AddedToken("b cc", normalized=False), AddedToken("d a", normalized=True)])
    tokenizer.encode_special_tokens = True
    description = json.loads(tokenizer.to_str())
    assert find_cuts(description) is not None
    texts = ["a b c", "xb ccx", "d a b", "b c  a", "word a  bb c\n\n Word", "\n\n", "  a  "]
    expected = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in TextEncoder(json.dumps(description), {}).encode_texts(texts)] == expected


def test_a_text_with_what_a_merge_joins_across_a_mark_is_not_cut(described: dict[str, dict[str, Any]]) -> None:
    model = described["yi"]["model"]
    vocabulary = model["vocab"] | {">\u2581": len(model["vocab"]) + 10, ">": len(model["vocab"]) + 11}
    description = described["yi"] | {"model": model | {"merges": [[">", "\u2581"]], "vocab": vocabulary}}
    library = Tokenizer.from_str(json.dumps(description))
    texts = ["a > b", "a >b c", "> ", "a b"]
    expected = [encoding.ids for encoding in library.encode_batch_fast(texts)]
    assert vocabulary[">\u2581"] in expected[0]
    assert [ids.tolist() for ids in TextEncoder(json.dumps(description), {}).encode_texts(texts)] == expected


def test_ids_stay_right_when_pieces_take_the_places_of_others(described: dict[str, dict[str, Any]]) -> None:
    encoder = TextEncoder(json.dumps(described["llama2, real"]), {})
    library = Tokenizer.from_str(json.dumps(described["llama2, real"]))
    texts = [" ".join(f"w{place + number * 7919}" for number in range(1_000)) for place in range(80)]
    expected = [encoding.ids for encoding in library.encode_batch_fast(texts, add_special_tokens=False)]
    for _ in range(2):
        assert [ids.tolist() for ids in encoder.encode_texts(texts)] == expected
