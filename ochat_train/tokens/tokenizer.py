"""A base model's tokenizer, made ready for a chat template: its special tokens are single ids, text never is."""

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from ochat_train.conversations.base_template import BaseTemplate
from ochat_train.conversations.described import Template
from ochat_train.files import require_packages
from ochat_train.tokens.strings import StringEncoder
from ochat_train.tokens.word_cache import Cuts, WordCache, find_cuts

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
# Texts on which tokenizers of the same vocabulary differ.
_PROBES = (
    *("Hi", " Hi", "  Hi", "Hi ", "", " ", "\nHi", "\n\n Hi", "\tHi\r\n", "a  b   c", "▁Hi", "\u00a0Hi", "don't I'LL"),
    *("0123456789", "3.14, 1,000", "größer, Привет", "漢字 ひらがな 한국어", "مرحبا हिन्दी", "🦙 🙂", "e\u0301\u200b"),
    *("\uff46\uff55ll \ufdfa", "\x00\x7f", "<div>", "def f(x):\n    return  x\n"),
)


@dataclass(frozen=True, slots=True)
class BaseFiles:
    """Where a base model or tokenizer is: its name for transformers, and its GGUF file if it is one."""

    name: str
    gguf_file: str | None

    @property
    def options(self) -> dict[str, str]:
        """Extra keyword arguments of `from_pretrained`."""
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of this machine with files of known names."""
        return self.gguf_file is None and Path(self.name).is_dir()

    def require(self, what: str, names: tuple[str, ...]) -> None:
        """Raise ValueError if it is a folder that has no file of any of these names."""
        if self.is_folder and not any(any(Path(self.name).glob(name)) for name in names):
            listed = f"none of {', '.join(names)}" if len(names) > 1 else f"no {names[0]}"
            raise ValueError(
                f"the folder {self.name} holds no {what}: {listed} is in it; copy it there, or name another"
            )

    def why_not(self, error: Exception) -> str:
        """Why transformers could not load the files, in one line."""
        message = " ".join(str(error).split())
        if self.gguf_file is not None or self.is_folder:
            return message
        return f"there is no folder of this name in {Path.cwd()}, and none came from the Hugging Face hub: {message}"


def locate_base(base: str) -> BaseFiles:
    """The files that a recipe's `base` means: a Hugging Face id, a folder, a `.gguf` file, or `package:NAME/FILE`.

    Raises ValueError when a file, or the package that should hold it, is not there.
    """
    if base.startswith("package:"):
        package, _, file = base.removeprefix("package:").partition("/")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # the parent of a dotted name
            spec = None
        if spec is None or spec.origin is None:
            raise ValueError(f"{base!r}: the Python package {package} is not installed; install it with pip")
        base = str(Path(spec.origin).parent / file)
    path = Path(base).expanduser()
    if not base.endswith(".gguf"):
        if base and path.is_dir():
            return BaseFiles(str(path) if base.startswith("~") else base, None)
        if base and path.exists():
            raise ValueError(f"{base} is a file; give the folder that it is in, a Hugging Face id or a .gguf file")
        organization = re.fullmatch(r"(?:(\w[\w.-]*)/)?\w[\w.-]*", base, re.ASCII)
        if organization is None:
            below = "" if path.is_absolute() else f" in {Path.cwd()}"
            raise ValueError(
                f"no folder {base or repr(base)}{below}; give a folder, a .gguf file, or a Hugging Face id"
            )
        if organization[1] and Path(organization[1]).is_dir() and not _is_in_hub_cache(base):
            raise ValueError(
                f"no folder {base}, though there is {Path(organization[1]).absolute()}; correct the name, or if it is "
                f"a Hugging Face id, run: hf download {base}"
            )
        return BaseFiles(base, None)
    if not path.is_file():
        raise ValueError(f"no file {path}")
    require_packages("reading a .gguf file", "gguf", "accelerate", extra="gguf")
    return BaseFiles(str(path.parent), path.name)


def _is_in_hub_cache(id: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE  # slow to import, and rarely needed

    return (Path(HF_HUB_CACHE) / f"models--{id.replace('/', '--')}").is_dir()


def require_model(base: str) -> None:
    """Raise ValueError if a base that is a folder has no configuration or no weights. The hub is not asked."""
    files = locate_base(base)
    files.require("model", ("config.json",))
    files.require("weights", _WEIGHT_FILES)


def _load_for_text(tokenizer_json: str) -> Tokenizer:
    """The tokenizer without truncation and padding, to which text that spells a special token is text."""
    tokenizer: Tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextEncoder:
    """What encoding needs of a tokenizer, and no more: small to send to another process, and quick to load there.

    `special_ids` are the ids of a template's special tokens. `cuts` are found unless they are given.
    """

    def __init__(
        self, tokenizer_json: str, special_ids: dict[str, int], cuts: Cuts | Literal[False] | None = False
    ) -> None:
        self.special_ids = special_ids
        self._json = tokenizer_json
        self._tokenizer = _load_for_text(tokenizer_json)
        self._cuts = find_cuts(json.loads(tokenizer_json)) if cuts is False else cuts
        self._words = WordCache(self._tokenizer, self._cuts) if self._cuts is not None else None

    def __reduce__(self) -> tuple[type[Self], tuple[str, dict[str, int], Cuts | None]]:
        return type(self), (self._json, self.special_ids, self._cuts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides ids."""
        return sha256(_load_for_text(self._json).to_str().encode()).hexdigest()

    @cached_property
    def strings(self) -> StringEncoder:
        """The same tokenizer for rendered strings, in which special tokens are control."""
        control: Tokenizer = Tokenizer.from_str(self._json)
        control.no_truncation()
        control.no_padding()
        return StringEncoder(control, _load_for_text(self._json))

    def id_of(self, token: str) -> int | None:
        """The id of a token; None when there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode_texts(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text alone, on all cores. No text yields a special token."""
        if self._words is not None:
            return self._words.encode_texts(texts)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]


class ChatTokenizer:
    """A tokenizer with a template's special tokens in it.

    `added` holds the ids of the special tokens that the base lacked; a model needs new embeddings for them. Raises
    ValueError when a special token of the template is not one id and may not be added, would get another id once saved,
    or is what text that spells it is encoded as.
    """

    def __init__(self, pretrained: Any, template: Template) -> None:
        self.pretrained = pretrained
        self.template = template = template.read(pretrained) if isinstance(template, BaseTemplate) else template
        vocabulary = pretrained.get_vocab()
        missing = [token for token in template.special_tokens if token not in vocabulary]
        if refused := [token for token in missing if token not in template.addable]:
            raise ValueError(
                f"template {template.name} needs the special token {refused[0]}, which is not one id of this "
                f"tokenizer ({pretrained.name_or_path}); choose a template that fits the base model"
            )
        # Adding a token that is there already marks it special, so that text which spells it is left alone. With the
        # base's own template it stays as it is else: some tokens take the white space beside them.
        is_base = isinstance(template, BaseTemplate)
        known = {str(token): token for token in pretrained.added_tokens_decoder.values() if is_base}
        special = []
        for token in template.special_tokens:
            names = ("normalized", "lstrip", "rstrip", "single_word") if token in known else ()
            options = {"normalized": False} | {name: getattr(known[token], name) for name in names}
            special.append(AddedToken(token, special=True, **options))
        pretrained.add_tokens(special, special_tokens=True)
        special_ids = {token: int(pretrained.convert_tokens_to_ids(token)) for token in template.special_tokens}
        self.added = {token: special_ids[token] for token in missing}
        processor: Any = pretrained.backend_tokenizer.post_processor
        for part in processor if hasattr(processor, "__getitem__") else (processor,):
            if hasattr(part, "trim_offsets"):  # transformers finds answers by characters, a leading space is one
                part.trim_offsets = False
        self.text = TextEncoder(pretrained.backend_tokenizer.to_str(), special_ids)
        for token, id_ in special_ids.items():
            if (saved_id := self.text.id_of(token)) != id_:  # a tokenizer.json gives added tokens ids of its own
                raise ValueError(
                    f"this tokenizer ({pretrained.name_or_path}) has gaps between its ids, so that {token} would be "
                    f"{id_} in training and {saved_id} once saved; choose a template whose special tokens it has"
                )
        for token, ids in zip(special_ids, self.encode_texts(list(special_ids)), strict=True):
            if special_ids[token] in ids:
                raise ValueError(
                    f"this tokenizer ({pretrained.name_or_path}) reads the text {token!r} as the special token, "
                    "so users could forge turns; use its fast tokenizer.json, or another base"
                )

    @property
    def end_id(self) -> int:
        """The id of the template's end token."""
        return self.special_ids[self.template.end_token]

    @property
    def pad_token(self) -> str:
        """The token with which an exported model pads: one that the base has, so that no row is new.

        Never the end token: training that gives padding no loss would give the end of answers none.
        """
        base, added = self.pretrained, dict[int, AddedToken](self.pretrained.added_tokens_decoder)
        special = [added[id_].content for id_ in sorted(added) if added[id_].special]
        named = [token for token in special if "pad" in token.lower()]
        unused = [token for token in special if token not in self.special_ids]
        candidates: tuple[str | None, ...] = (base.pad_token, *named, base.unk_token, base.eos_token, *unused, *special)
        return next(token for token in candidates if token and token != self.template.end_token)

    @property
    def num_ids(self) -> int:
        """One above the largest id."""
        return int(max(self.pretrained.get_vocab().values())) + 1

    @property
    def special_ids(self) -> dict[str, int]:
        """The ids of the template's special tokens."""
        return self.text.special_ids

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides ids."""
        return self.text.digest

    def encode_texts(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """The ids of each text alone, on all cores. No text yields a special token."""
        return self.text.encode_texts(texts)

    def save(self, folder: Path) -> None:
        """Write the tokenizer, so that `AutoTokenizer.from_pretrained(folder)` gives it back."""
        self.pretrained.save_pretrained(folder)
        file = folder / "tokenizer_config.json"
        config = json.loads(file.read_bytes())
        # The class with which transformers 4 and 5 take tokenizer.json as it is. Code beside a base was not run here.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("auto_map", None)
        if extra := config.pop("extra_special_tokens", None):  # a list, which transformers 4 reads under this name
            config["additional_special_tokens"] = extra
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(name: str, template: Template) -> ChatTokenizer:
    """The tokenizer of a base model (see `locate_base`), with the template's special tokens.

    A base's tokenizer.json is taken as it is; AutoTokenizer would make parts of it anew for many classes, and encode
    `Hi` and ` Hi` alike for Llama 2. A base without one is what transformers converts it to. Raises ValueError.
    """
    from transformers import PreTrainedTokenizerFast  # slow to import; processes that encode do without

    files = locate_base(name)
    files.require("tokenizer", _TOKENIZER_FILES)
    if files.gguf_file is None and not files.is_folder and not _is_in_hub_cache(files.name):
        print(f"{name}: there is no folder of this name in {Path.cwd()}; asking the Hugging Face hub", flush=True)
    try:
        if _has_tokenizer_json(files):
            pretrained = PreTrainedTokenizerFast.from_pretrained(files.name)
        else:
            from transformers import AutoTokenizer  # imports torch

            pretrained = AutoTokenizer.from_pretrained(files.name, **files.options)
    except Exception as error:  # of many kinds: tokenizers itself raises nothing narrower
        raise ValueError(f"no tokenizer could be loaded from {name}: {files.why_not(error)}") from error
    if not getattr(pretrained, "is_fast", False):
        raise ValueError(f"{name} has no fast tokenizer (tokenizer.json); convert it with transformers first")
    return ChatTokenizer(pretrained, template)


def compare_with_auto(name: str, tokenizer: ChatTokenizer) -> str | None:
    """How the ids of `tokenizer`, loaded from `name`, differ from those of AutoTokenizer on the same files, in a line.

    None where they are the same, or where AutoTokenizer would run code that is not transformers'.
    """
    from transformers import AutoTokenizer

    files = locate_base(name)
    if not _has_tokenizer_json(files):
        return "it has no tokenizer.json, so its ids are those of what transformers converts it to"
    try:
        auto = AutoTokenizer.from_pretrained(files.name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    # After a special token as well, where some put a space before a text, and others do not.
    special = next((token for token in tokenizer.pretrained.all_special_tokens if token in auto.get_vocab()), "")
    probes = [*_PROBES, *(special + text for text in _PROBES)]
    ours, others = (
        [one.encode(text, add_special_tokens=False) for text in probes] for one in (tokenizer.pretrained, auto)
    )
    different = [item for item in zip(probes, others, ours, strict=True) if item[1] != item[2]]
    if not different:
        return None
    probe, other, own = different[0]
    return (
        f"tokenizer.json is taken as it is; {type(auto).__name__}, which AutoTokenizer makes of it, differs in "
        f"{len(different)} of {len(probes)} probes, first {probe!r}: {other}, not {own}"
    )


def _has_tokenizer_json(files: BaseFiles) -> bool:
    from transformers.utils.hub import cached_file

    options: Any = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    return files.gguf_file is None and cached_file(files.name, "tokenizer.json", **options) is not None
