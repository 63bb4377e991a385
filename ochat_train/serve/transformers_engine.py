"""The engine without vLLM: transformers' `generate` on one model, with the prompts of training, an answer at a time."""

import argparse
import asyncio
import contextlib
import copy
import logging
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ochat_train.model.exported import read_export
from ochat_train.model.lora import require_peft
from ochat_train.model.pretrained import DTYPES, load_model
from ochat_train.model.quantised import round_to_4_bits
from ochat_train.serve.gate import CHAT, HEALTH, EngineTraits, Gate
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.protocol import STREAM_END, AnswerText, ChatCompletion, ChatRequest, Choice, FinishReason, Usage
from ochat_train.serve.served import Served
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

T = TypeVar("T")

# Fields of a request that `generate` has no equal to, with the values that change nothing.
UNABLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
}
_DEFAULTS = {"--device": "auto", "--dtype": "auto", "--attn-implementation": "sdpa"}
_SHUTDOWN_S = 5  # for answers that are under way when a signal comes


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """The flags of this engine. Raises ValueError for others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag, default in _DEFAULTS.items():
        parser.add_argument(flag, default=default)
    try:
        options, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        known = ", ".join(_DEFAULTS)
        raise ValueError(f"the engine transformers has no flag {unknown[0]}; it has {known}, and vLLM has more")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of auto, {', '.join(DTYPES)}")
    return options


def serve(
    served: Served,
    options: argparse.Namespace,
    sockets: list[socket.socket],
    *,
    keys: ApiKeys,
    log: logging.Logger | None,
    ready: str,
) -> None:
    """Load the model and answer on the sockets until a signal comes. `ready` is printed when the model is loaded."""
    import uvicorn

    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings may quote a request's settings
    tokenizer = served.load_tokenizer()
    app = make_app(served, load(served, tokenizer, options), tokenizer, keys=keys, log=log)
    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    print(ready, flush=True)
    uvicorn.Server(config).run(sockets=sockets)


def load(served: Served, tokenizer: ChatTokenizer, options: argparse.Namespace) -> PreTrainedModel:
    """The model in memory, adapters merged into their base. Raises ValueError."""
    try:
        if served.adapter is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                served.folder,
                dtype=DTYPES.get(options.dtype, "auto"),
                device_map=options.device,
                attn_implementation=options.attn_implementation,
            )
            return model
        return _merge_adapter(served, tokenizer, options)
    except (OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"{served.folder} cannot be loaded: {error}") from error


def _merge_adapter(served: Served, tokenizer: ChatTokenizer, options: argparse.Namespace) -> PreTrainedModel:
    """The base with the adapters in its weights, in the dtype in which they were trained."""
    require_peft()
    from peft import PeftModel

    assert served.adapter is not None
    trained = (read_export(served.folder) or {})["run"]["recipe"]["model"]["dtype"]
    dtype = trained if options.dtype == "auto" else options.dtype
    base = load_model(served.adapter.base, None, dtype=dtype, num_ids=tokenizer.num_ids, added_ids=[], seed=0)
    if served.adapter.base_bits is not None:
        round_to_4_bits(base, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    merged: Any = PeftModel.from_pretrained(base, str(served.folder)).merge_and_unload()
    merged.generation_config = GenerationConfig.from_pretrained(served.folder)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: PreTrainedModel = merged.to(device).eval()
    return model


def make_app(
    served: Served, model: PreTrainedModel, tokenizer: ChatTokenizer, *, keys: ApiKeys, log: logging.Logger | None
) -> ASGIApp:
    """The ASGI application: the gate around one route for chats and one for health."""
    generator = Generator(model, tokenizer)

    async def chat(request: Request) -> Response:
        asked = ChatRequest.model_validate_json(await request.body())
        answer = Answer(asked, request.headers["x-request-id"], generator)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        whole = await until_disconnected(request, answer.whole())
        return Response(whole.to_json(), media_type="application/json")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(routes=[Route(CHAT, chat, methods=["POST"]), Route(HEALTH, health)])
    traits = EngineTraits("the engine transformers", unable=UNABLE, renders_text=False, fills_room=True)
    return Gate(app, served=served, tokenizer=tokenizer, engine=traits, keys=keys, log=log)


async def until_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. Raises ClientDisconnect then."""
    result = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # after the body, only a disconnect can come
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        result.cancel()
        gone.cancel()


class Generator:
    """Runs `generate` in one thread; requests wait in its queue."""

    def __init__(self, model: PreTrainedModel, tokenizer: ChatTokenizer) -> None:
        self._model, self.tokenizer = model, tokenizer
        self._thread = ThreadPoolExecutor(max_workers=1)

    def submit(self, prompt_ids: list[int], request: ChatRequest, stream: "TextStream") -> asyncio.Future[None]:
        """Begin an answer; the stream gets its tokens. Cancelling the future before its turn removes it."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._run, prompt_ids, request, stream)

    def _run(self, prompt_ids: list[int], request: ChatRequest, stream: "TextStream") -> None:
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed)
        ids = torch.tensor([prompt_ids], device=self._model.device)
        generate: Any = self._model.generate
        with contextlib.suppress(EndOfAnswer):
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._sampling(request),
                streamer=stream,
            )

    def _sampling(self, request: ChatRequest) -> GenerationConfig:
        """OpenAI's sampling: temperature 1 unless the request or the model says otherwise, no top-k; 0 is greedy."""
        config = copy.deepcopy(self._model.generation_config)
        assert config is not None
        config.max_new_tokens = request.max_tokens
        if request.temperature is not None:
            config.temperature = request.temperature
        elif config.temperature is None:
            config.temperature = 1.0
        config.do_sample = config.temperature > 0
        if request.top_p is not None:
            config.top_p = request.top_p
        config.top_k = config.top_k or 0  # None would be 50
        return config


class Answer:
    """One answer, as a whole or as the events of a stream."""

    def __init__(self, request: ChatRequest, id_: str, generator: Generator) -> None:
        self._request, self._id, self._generator = request, id_, generator
        self._created = int(time.time())
        conversation = request.to_conversation(request.condition or "")
        self._prompt_ids = encode_prompt(conversation, generator.tokenizer)
        self._stream = TextStream(generator.tokenizer, request.stops)

    async def whole(self) -> ChatCompletion:
        """The whole answer."""
        text = "".join([piece async for piece in self._pieces()])
        message = AnswerText(role="assistant", content=text)
        choice = Choice(message=message, finish_reason=self._stream.finish_reason)
        return self._completion("chat.completion", choice, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last one has the usage, as a log of requests wants it."""
        yield self._completion("chat.completion.chunk", Choice(delta=AnswerText(role="assistant"))).to_event()
        async for piece in self._pieces():
            yield self._completion("chat.completion.chunk", Choice(delta=AnswerText(content=piece))).to_event()
        end = Choice(delta=AnswerText(), finish_reason=self._stream.finish_reason)
        yield self._completion("chat.completion.chunk", end, self._usage()).to_event() + STREAM_END

    async def _pieces(self) -> AsyncIterator[str]:
        """The text as it grows. Raises what `generate` raises; ends `generate` when nobody iterates any more."""
        pieces, loop = asyncio.Queue[str | None](), asyncio.get_running_loop()
        self._stream.send = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        done = self._generator.submit(self._prompt_ids, self._request, self._stream)
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await done
        finally:
            self._stream.is_abandoned = True
            done.cancel()

    def _completion(self, kind: Any, choice: Choice, usage: Usage | None = None) -> ChatCompletion:
        return ChatCompletion(
            id=self._id, object=kind, created=self._created, model=self._request.model, choices=[choice], usage=usage
        )

    def _usage(self) -> Usage:
        num_prompt, num_answer = len(self._prompt_ids), self._stream.num_tokens
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_answer, total_tokens=num_prompt + num_answer)


class EndOfAnswer(Exception):
    """Raised by a streamer to leave `generate`: a stop text was found, or the client has gone."""


class TextStream(BaseStreamer):
    """Text from tokens: `generate` calls `put` and `end` in its thread, and `send` gets each piece of text.

    It ends before the first of the stop texts. What may be the beginning of one, and bytes that are no whole character
    yet, are held back. Without stop texts the joined pieces are the decoded answer.
    """

    def __init__(self, tokenizer: ChatTokenizer, stops: list[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
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
        if self._ids[-1] == self._tokenizer.end_id:
            self.finish_reason = "stop"
        self._add(self._decode(is_last=False))

    def end(self) -> None:
        """Send what was held back. Raises EndOfAnswer."""
        self._add(self._decode(is_last=True))
        if self._held:
            self.send(self._held)

    def _decode(self, *, is_last: bool) -> str:
        decode: Any = self._tokenizer.pretrained.decode
        before = decode(self._ids[self._context : self._num_decoded], skip_special_tokens=True)
        text = decode(self._ids[self._context :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not is_last:
            return ""
        self._context, self._num_decoded = self._num_decoded, len(self._ids)
        return str(text[len(before) :])

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
