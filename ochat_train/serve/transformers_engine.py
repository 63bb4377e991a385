"""The engine without vLLM: transformers' `generate` on one model, with the prompts of training, an answer at a time."""

import argparse
import asyncio
import contextlib
import copy
import json
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
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ochat_train.model.exported import read_export
from ochat_train.model.lora import require_peft
from ochat_train.model.pretrained import DTYPES, load_model
from ochat_train.model.quantised import round_to_4_bits
from ochat_train.model.text_part import auto_class
from ochat_train.serve.completion import AnswerText, ChatCompletion, Choice, Logprobs, ToolCall, Usage
from ochat_train.serve.gate import CHAT, HEALTH, EngineTraits, Gate
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.process import listen
from ochat_train.serve.protocol import STREAM_END, ChatRequest
from ochat_train.serve.served import Served
from ochat_train.serve.text_stream import EndOfAnswer, TextStream
from ochat_train.serve.tool_calls import CallForm, CallReader, find_form
from ochat_train.tokens.chat_template import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

T = TypeVar("T")

_DEFAULTS = {"--device": "auto", "--dtype": "auto", "--attn-implementation": "sdpa"}
# Flags of vLLM that change how fast it answers and what it prints, but no answer.
_SPEED_OF_VLLM = (
    "--disable-log-stats",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--swap-space",
)


def parse_flags(flags: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this engine, and those of vLLM that mean nothing to it. Raises ValueError for others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag, default in _DEFAULTS.items():
        parser.add_argument(flag, default=default)
    for flag in _SPEED_OF_VLLM:
        parser.add_argument(flag, nargs="?", const="", default=None)
    try:
        options, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        known = ", ".join(_DEFAULTS)
        raise ValueError(f"the engine transformers has no flag {unknown[0]}; it has {known}, and vLLM has more")
    if options.dtype != "auto" and options.dtype not in DTYPES:
        raise ValueError(f"--dtype {options.dtype}: choose one of auto, {', '.join(DTYPES)}")
    return options, [flag for flag in _SPEED_OF_VLLM if getattr(options, flag[2:].replace("-", "_")) is not None]


def serve(
    served: Served,
    options: argparse.Namespace,
    sockets: list[socket.socket],
    *,
    keys: ApiKeys,
    log: logging.Logger | None,
    wrap: Callable[[ASGIApp], ASGIApp],
    ready: Callable[[], None],
) -> None:
    """Load the model and answer on the sockets until a signal comes. wrap: a last layer around all. ready: is called
    once they listen.

    Raises ValueError.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)  # its warnings may quote a request's settings
    tokenizer = served.load_tokenizer()
    app = make_app(served, load(served, tokenizer, options), tokenizer, keys=keys, log=log)
    listen(wrap(app), sockets, ready)


def load(served: Served, tokenizer: ChatTokenizer, options: argparse.Namespace) -> PreTrainedModel:
    """The model in memory, adapters merged into their base. Raises ValueError."""
    try:
        if served.adapter is None:
            model: PreTrainedModel = auto_class(AutoConfig.from_pretrained(served.folder)).from_pretrained(
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
    form = find_form(served.spelling(tokenizer))

    async def chat(request: Request) -> Response:
        asked = ChatRequest.model_validate_json(await request.body())
        answer = Answer(asked, request.headers["x-request-id"], generator, form)
        if asked.stream:
            return StreamingResponse(answer.events(), media_type="text/event-stream")
        whole = await until_disconnected(request, answer.whole())
        return Response(whole.to_json(), media_type="application/json")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(routes=[Route(CHAT, chat, methods=["POST"]), Route(HEALTH, health)])
    traits = EngineTraits(
        "the engine transformers", can_force_a_form=False, reads_calls=True, renders_text=False, fills_room=True
    )
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

    def submit(
        self, prompt_ids: list[int], request: ChatRequest, number: int, stream: TextStream
    ) -> asyncio.Future[None]:
        """Begin the answer `number`; the stream gets its tokens. Cancelling the future before its turn removes it."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._thread, self._run, prompt_ids, request, number, stream)

    def _run(self, prompt_ids: list[int], request: ChatRequest, number: int, stream: TextStream) -> None:
        if stream.is_abandoned:
            return
        torch.manual_seed(secrets.randbits(63) if request.seed is None else request.seed + number)
        ids = torch.tensor([prompt_ids], device=self._model.device)
        config = self._sampling(request)
        stream.end_ids = set(config.eos_token_id or [])
        generate: Any = self._model.generate
        watch = self._model.register_forward_hook(stream.see) if request.logprobs else contextlib.nullcontext()
        with contextlib.suppress(EndOfAnswer), watch:
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([Penalties(request, len(prompt_ids))]),
                streamer=stream,
            )

    def _sampling(self, request: ChatRequest) -> GenerationConfig:
        """OpenAI's sampling: temperature 1 unless the request or the model says otherwise, no top-k; 0 is greedy."""
        config = copy.deepcopy(self._model.generation_config)
        assert config is not None
        config.max_new_tokens, config.min_new_tokens = request.max_tokens, request.min_tokens
        if request.temperature is not None:
            config.temperature = request.temperature
        elif config.temperature is None:
            config.temperature = 1.0
        config.do_sample = config.temperature > 0
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if (value := getattr(request, name)) is not None:
                setattr(config, name, value)
        config.top_k = max(config.top_k or 0, 0)  # None would be 50
        ends = [] if request.ignore_eos else [self.tokenizer.end_id]
        config.eos_token_id = [*ends, *(request.stop_token_ids or [])] or None
        return config


class Penalties(LogitsProcessor):
    """OpenAI's penalties for tokens that the answer has already, and the request's biases, before the temperature."""

    def __init__(self, request: ChatRequest, num_prompt: int) -> None:
        self._presence, self._frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
        self._bias = {int(id_): value for id_, value in (request.logit_bias or {}).items()}
        self._num_prompt = num_prompt

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores, f32[1, V], after the tokens, i64[1, L]."""
        if self._presence or self._frequency:
            counts = torch.bincount(input_ids[0, self._num_prompt :], minlength=scores.shape[1])
            scores = scores - self._frequency * counts - self._presence * (counts > 0)
        if self._bias:
            scores = scores.clone()
            scores[0, list(self._bias)] += torch.tensor(list(self._bias.values()), device=scores.device)
        return scores


class Answer:
    """The answers to one request, as a whole or as the events of a stream."""

    def __init__(self, request: ChatRequest, id_: str, generator: Generator, form: CallForm | None) -> None:
        self._request, self._id, self._generator, self._form = request, id_, generator, form
        self._created = int(time.time())
        conversation = request.to_conversation(request.asked_condition or "")
        continues = bool(request.continue_final_message)
        self._prompt_ids = encode_prompt(conversation, generator.tokenizer, continues=continues)
        num_top = request.top_logprobs or 0
        kept = f"{form.before}{form.after}" if form is not None and request.tool_names else ""
        self._streams = [
            TextStream(generator.tokenizer, request.stop or [], num_top, kept) for _ in range(request.n or 1)
        ]

    async def whole(self) -> ChatCompletion:
        """The whole answers."""
        choices = []
        for number, stream in enumerate(self._streams):
            parts = [part async for part in self._parts(number)]
            calls = [part for part in parts if isinstance(part, ToolCall)]
            text = "".join(part for part in parts if isinstance(part, str))
            message = AnswerText(role="assistant", content=text, tool_calls=calls or None)
            logprobs = self._logprobs(stream)
            choices.append(Choice(index=number, message=message, logprobs=logprobs, finish_reason=stream.finish_reason))
        return self._completion("chat.completion", choices, self._usage())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last one has the usage, as a log of requests wants it."""
        for number, stream in enumerate(self._streams):
            yield self._event(Choice(index=number, delta=AnswerText(role="assistant")))
            async for part in self._parts(number):
                delta = AnswerText(content=part) if isinstance(part, str) else AnswerText(tool_calls=[part])
                yield self._event(Choice(index=number, delta=delta, logprobs=self._logprobs(stream)))
            logprobs, reason = self._logprobs(stream), stream.finish_reason
            end = Choice(index=number, delta=AnswerText(), logprobs=logprobs, finish_reason=reason)
            is_last = number + 1 == len(self._streams)
            yield self._event(end, self._usage() if is_last else None)
        yield STREAM_END

    async def _parts(self, number: int) -> AsyncIterator[str | ToolCall]:
        """Texts and calls as they come; the finish reason is known at the end."""
        reader, stream = CallReader(self._form, self._request.tool_names), self._streams[number]
        num_calls = 0
        async for piece in self._pieces(number):
            for part in reader.read(piece or "", is_last=piece is None):
                if isinstance(part, str):
                    yield part
                elif not num_calls or self._request.parallel_tool_calls is not False:
                    function = {"name": part["name"], "arguments": json.dumps(part["arguments"], ensure_ascii=False)}
                    yield ToolCall(index=num_calls, id=f"call_{secrets.token_hex(12)}", function=function)
                    num_calls += 1
        if num_calls and stream.finish_reason == "stop":
            stream.finish_reason = "tool_calls"

    async def _pieces(self, number: int) -> AsyncIterator[str | None]:
        """The text as it grows, and None at its end. Raises what `generate` raises.

        `generate` ends when nobody iterates any more.
        """
        stream, pieces, loop = self._streams[number], asyncio.Queue[str | None](), asyncio.get_running_loop()
        stream.send = lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece)
        done = self._generator.submit(self._prompt_ids, self._request, number, stream)
        done.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await done
            yield None
        finally:
            stream.is_abandoned = True
            done.cancel()

    def _logprobs(self, stream: TextStream) -> Logprobs | None:
        """Those of the tokens that came since the last call."""
        if not self._request.logprobs:
            return None
        taken, stream.logprobs = stream.logprobs, []
        return Logprobs(content=taken)

    def _event(self, choice: Choice, usage: Usage | None = None) -> bytes:
        return self._completion("chat.completion.chunk", [choice], usage).to_event()

    def _completion(self, kind: Any, choices: list[Choice], usage: Usage | None) -> ChatCompletion:
        return ChatCompletion(
            id=self._id, object=kind, created=self._created, model=self._request.model, choices=choices, usage=usage
        )

    def _usage(self) -> Usage:
        num_prompt, num_answer = len(self._prompt_ids), sum(stream.num_tokens for stream in self._streams)
        return Usage(prompt_tokens=num_prompt, completion_tokens=num_answer, total_tokens=num_prompt + num_answer)
