"""Text from tokens as they come, up to a stop text, for the engine of transformers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ochat_train.serve.completion import FinishReason, TokenLogprob
from ochat_train.tokens.tokenizer import ChatTokenizer


class EndOfAnswer(Exception):
    """Raised by a streamer to leave `generate`: a stop text was found, or the client has gone."""


class TextStream(BaseStreamer):
    """Text from tokens: `generate` calls `put` and `end` in its thread, and `send` gets each piece of text.

    It ends before the first of the stop texts. What may be the beginning of one, and bytes that are no whole character
    yet, are held back. Without stop texts the joined pieces are the decoded answer. Special tokens have no text, but
    for those that `kept` contains.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: list[str], num_top: int = 0, kept: str = "") -> None:
        self._tokenizer, self._stops, self._num_top = tokenizer, stops, num_top
        self.end_ids = {tokenizer.end_id}
        self.logprobs: list[TokenLogprob] = []
        special = {id_: str(token) for id_, token in tokenizer.pretrained.added_tokens_decoder.items() if token.special}
        self._skipped = {id_ for id_, token in special.items() if token not in kept}
        self._keeps = len(self._skipped) < len(special)
        self._seen: Tensor | None = None
        self._num_held = max(map(len, stops), default=1) - 1
        self._ids: list[int] = []
        self._context, self._num_decoded = 0, 0  # text is made of ids[num_decoded:], decoded after ids[context:]
        self._held = ""
        self.send: Callable[[str], object] = lambda piece: None
        self.finish_reason: FinishReason = "length"
        self.is_abandoned = False

    @property
    def num_tokens(self) -> int:
        """How many tokens the answer has, the end token included."""
        return len(self._ids)

    def put(self, value: Tensor) -> None:
        """Take the prompt, i64[1, L], or the next token, i64[1]. Raises EndOfAnswer."""
        if self.is_abandoned:
            raise EndOfAnswer
        if value.ndim == 2:
            return
        self._ids += value.tolist()
        if self._seen is not None:
            self.logprobs.append(self._describe(self._seen, self._ids[-1]))
        if self._ids[-1] in self.end_ids:
            self.finish_reason = "stop"
        self._add(self._decode(is_last=False))

    def see(self, module: Any, arguments: Any, output: Any) -> None:
        """Keep the model's own probabilities of the next token, from a forward hook."""
        self._seen = output.logits[0, -1].float().log_softmax(-1)

    def _describe(self, logprobs: Tensor, id_: int) -> TokenLogprob:
        def describe(one: int) -> TokenLogprob:
            text = str(self._tokenizer.pretrained.decode([one]))
            return TokenLogprob(token=text, logprob=float(logprobs[one]), bytes=list(text.encode()))

        top = [describe(one) for one in logprobs.topk(self._num_top).indices.tolist()]
        return describe(id_).model_copy(update={"top_logprobs": top})

    def end(self) -> None:
        """Send what was held back. Raises EndOfAnswer."""
        self._add(self._decode(is_last=True))
        if self._held:
            self.send(self._held)

    def _decode(self, *, is_last: bool) -> str:
        before = self._text_of(self._ids[self._context : self._num_decoded])
        text = self._text_of(self._ids[self._context :])
        if text.endswith("\ufffd") and not is_last:
            return ""
        self._context, self._num_decoded = self._num_decoded, len(self._ids)
        return str(text[len(before) :])

    def _text_of(self, ids: list[int]) -> str:
        decode: Any = self._tokenizer.pretrained.decode
        if self._keeps:
            return str(decode([id_ for id_ in ids if id_ not in self._skipped]))
        return str(decode(ids, skip_special_tokens=True))

    def _add(self, piece: str) -> None:
        self._held += piece
        if places := [place for stop in self._stops if (place := self._held.find(stop)) >= 0]:
            self.finish_reason = "stop"
            self.send(self._held[: min(places)])
            raise EndOfAnswer
        num_ready = len(self._held) - self._num_held
        if num_ready > 0:
            self.send(self._held[:num_ready])
            self._held = self._held[num_ready:]
