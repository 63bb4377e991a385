"""transformers' own server of chat completions, for one model, with the prompts of training.

Its parts are used, not its command: that one loads and unloads models at anybody's request, and knows no keys.
Answers are made one after the other.
"""

import argparse
import asyncio
import logging
import socket
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    GenerationConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from ochat_train.conversations.schema import Conversation, Message
from ochat_train.model.exported import read_export
from ochat_train.model.lora import require_peft
from ochat_train.model.pretrained import DTYPES, load_model
from ochat_train.serve.gate import CHAT, HEALTH, App, Engine, Gate
from ochat_train.serve.keys import ApiKeys
from ochat_train.serve.served import Served
from ochat_train.tokens.prompt import encode_prompt
from ochat_train.tokens.tokenizer import ChatTokenizer

# What its handler ignores, or reads otherwise than OpenAI does.
UNABLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
}
FLAGS = ("--device", "--dtype", "--attn-implementation")
_SHUTDOWN_S = 5  # for answers that are being given when the server is told to stop


def parse_flags(flags: Sequence[str]) -> argparse.Namespace:
    """The flags of this engine. Raises ValueError for others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in FLAGS:
        parser.add_argument(flag, default="sdpa" if flag == FLAGS[2] else "auto")
    try:
        options, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"transformers' server has no flag {unknown[0]}; it has {', '.join(FLAGS)}, and vLLM has more")
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
    """Load the model and answer on the sockets until a signal comes. `ready` is printed when it listens."""
    import uvicorn

    logging.getLogger("transformers").setLevel(logging.ERROR)  # it tells of each request
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


def make_app(
    served: Served, model: PreTrainedModel, tokenizer: ChatTokenizer, *, keys: ApiKeys, log: logging.Logger | None
) -> App:
    """The ASGI application: transformers' handler of chats behind our gate, with prompts as training has them."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def apply_chat_template(messages: list[dict[str, Any]], *, condition: str, **_: Any) -> BatchEncoding:
        """As the handler calls it: tensors of one prompt."""
        turns = tuple(Message(message["role"], message["content"]) for message in messages)
        ids = torch.tensor([encode_prompt(Conversation("", "", condition, "", turns), tokenizer)])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    tokenizer.pretrained.apply_chat_template = apply_chat_template
    one: Any = _OneModel(_Generator(model), tokenizer.pretrained)
    handler = _ChatHandler(model_manager=one, generation_state=_OneAfterTheOther())

    async def chat(request: Request) -> Response:
        response: Response = await handler.handle_request(await request.json(), request.headers["x-request-id"])
        return response

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    app = Starlette(routes=[Route(CHAT, chat, methods=["POST"]), Route(HEALTH, health)])
    engine = Engine("transformers' server", served.name, unable=UNABLE, renders_text=False, fills_room=True)
    return Gate(app, served=served, tokenizer=tokenizer, engine=engine, keys=keys, log=log)


def load(served: Served, tokenizer: ChatTokenizer, options: argparse.Namespace) -> PreTrainedModel:
    """The model in memory, adapters merged into their base. Raises ValueError."""
    placement = {"device_map": options.device, "attn_implementation": options.attn_implementation}
    try:
        if served.adapter is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                served.folder, dtype=DTYPES.get(options.dtype, "auto"), **placement
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
    merged: Any = PeftModel.from_pretrained(base, str(served.folder)).merge_and_unload()
    merged.generation_config = GenerationConfig.from_pretrained(served.folder)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model: PreTrainedModel = merged.to(device).eval()
    return model


class _Generator:
    """What the handler needs of a model. It hides the type.

    For some types, Qwen 2 among them, the handler parses answers, and begins with the prompt, decoded to a string: what
    a user writes is control again there, and comes back as a part of the answer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.device, self.generation_config, self.generate = model.device, model.generation_config, model.generate
        self.config = SimpleNamespace(model_type="")


class _OneModel:
    """What the handler needs of transformers' ModelManager, for a model that is loaded already."""

    force_model = None
    get_model_modality = staticmethod(ModelManager.get_model_modality)

    def __init__(self, generator: _Generator, tokenizer: Any) -> None:
        self._loaded = generator, tokenizer

    def process_model_name(self, name: str) -> str:
        """The name under which answers show the model."""
        return name

    def load_model_and_processor(self, name: str, **_: Any) -> tuple[_Generator, Any]:
        """The model and its tokenizer."""
        return self._loaded


class _ChatHandler(ChatCompletionHandler):
    """Samples as OpenAI's API says: at temperature 1 unless the request or the model says otherwise, from all tokens.

    Theirs is greedy at any temperature when the model's generation configuration does not sample.
    """

    def _build_generation_config(
        self, body: dict[str, Any], model_config: GenerationConfig, use_cb: bool = False
    ) -> Any:
        config = super()._build_generation_config(body, model_config, use_cb=use_cb)
        config.temperature = 1.0 if config.temperature is None else config.temperature
        config.do_sample = config.temperature > 0
        config.top_k = config.top_k or 0  # None would be 50
        return config


class _OneAfterTheOther(GenerationState):
    """Gives out the one queue of requests."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: GenerateManager = _Queue()  # type: ignore[no-untyped-call]  # of transformers

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        """The queue, whatever the model is called."""
        return self._queue


class _Queue(GenerateManager):
    """transformers' queue, in which an answer that nobody waits for any more is ended."""

    def async_submit(self, fn: Any, *args: Any, **kwargs: Any) -> asyncio.Future[Any]:
        """Put a call of `generate` into the queue. Cancelling what is returned ends it at its next token."""
        is_cancelled = threading.Event()
        criteria = StoppingCriteriaList([_Cancelled(is_cancelled)])
        # Shielded: the queue's thread sets the result of a cancelled one, too.
        result = asyncio.shield(super().async_submit(fn, *args, stopping_criteria=criteria, **kwargs))
        result.add_done_callback(lambda done: is_cancelled.set() if done.cancelled() else None)
        return result

    async def generate_non_streaming(  # type: ignore[override]  # theirs differs from its own base
        self, model: Any, processor: Any, inputs: Any, gen_config: GenerationConfig, request_id: str
    ) -> tuple[str, int, Tensor]:
        """The answer, without the stop text that ended it."""
        text, length, ids = await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        stops = [gen_config.stop_strings] if isinstance(gen_config.stop_strings, str) else gen_config.stop_strings or []
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))], length, ids


class _Cancelled(StoppingCriteria):
    """Stops when the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        """bool[B]."""
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)
