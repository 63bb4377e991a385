"""Bases' tokenizers of the kinds that models have, a few hundred ids each, as their makers publish them."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

_DATA = Path(__file__).resolve().parents[1] / "data/quickstart.json"
_SPECIAL = [
    *("<unk>", "<s>", "</s>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<bos>", "<start_of_turn>"),
]

# The class that the base's tokenizer_config.json names, by kind. AutoTokenizer makes normalizer and pre_tokenizer of
# these classes anew, whatever tokenizer.json says.
CLASSES = {
    "llama2": "LlamaTokenizer",  # a space in front of every text: Llama 2, Mistral
    "yi": "LlamaTokenizer",  # no space in front
    "metaspace": "LlamaTokenizer",  # a space in front of texts that have none: what transformers 5 makes of Llama 2
    "metaspace_first": "LlamaTokenizer",  # the same at the beginning alone
    "gpt2": "GPT2Tokenizer",
    "gpt2_prefix": "GPT2Tokenizer",  # a space in front of texts that have none
    "gpt4": "GPT2Tokenizer",  # digits in threes, words with the sign before them
}
SENTENCE_PIECE = ("llama2", "yi", "metaspace", "metaspace_first")
TEXTS = (
    *("Hi", "Hi ", "Hi\n", "größer 漢字 🦙", "▁Hi", "0123 4", "don't", "a  b", "def f():\n    return  1\n"),
    *("", " Hi", "  Hi", " ", "   ", "\nHi", "\n\n Hi", "\n", " \nHi", "\tHi", " 漢", " ▁"),
)


def write_base(folder: Path, kind: str, *, model_type: str | None = None, chat_template: str | None = None) -> Path:
    """The folder of a base: tokenizer.json, tokenizer_config.json and, with a type of model, config.json."""
    is_sentence_piece = kind in SENTENCE_PIECE
    trained = Tokenizer(BPE())
    _set_parts(trained, "yi" if is_sentence_piece else kind)  # no token begins with the space in front
    alphabet = [] if is_sentence_piece else pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    texts = [turn["value"] for record in json.loads(_DATA.read_text())[:60] for turn in record["conversations"]]
    trained.train_from_iterator([*texts, "don't I'll 1234567890 "], trainer)
    model = json.loads(trained.to_str())["model"]
    words = [f"<0x{byte:02X}>" for byte in range(256)] if is_sentence_piece else []
    words = [*_SPECIAL, *words, *sorted(model["vocab"], key=model["vocab"].get)]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [tuple(merge) for merge in model["merges"]]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True} if is_sentence_piece else {}
    made = Tokenizer(BPE(vocabulary, merges, **options))
    _set_parts(made, kind)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": CLASSES[kind], "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config |= {"chat_template": chat_template} if chat_template is not None else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": kind != "metaspace_first"}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def _set_parts(tokenizer: Tokenizer, kind: str) -> None:
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "yi":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    elif kind in SENTENCE_PIECE:
        scheme = "first" if kind == "metaspace_first" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    else:
        split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "gpt2_prefix", use_regex=kind != "gpt4")
        parts = [pre_tokenizers.Split(split, "isolated"), byte_level] if kind == "gpt4" else [byte_level]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        tokenizer.decoder = decoders.ByteLevel()
        return
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if kind == "yi" else [*steps, decoders.Strip(" ", 1, 0)])
