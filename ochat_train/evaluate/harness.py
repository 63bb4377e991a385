"""The tasks of lm-eval (EleutherAI's harness), run by its own library with the template of training."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from ochat_train.evaluate.endpoint import is_url, reach


def run_tasks(
    target: str,
    tasks: Sequence[str],
    *,
    model: str | None,
    condition: str | None,
    limit: int | None,
    batch_size: int,
    concurrency: int,
) -> dict[str, Any]:
    """The result of lm-eval's `simple_evaluate`.

    lm-eval's hf backend loads a folder, and can also score given answers by likelihood. A URL is asked for answers, so
    tasks of likelihoods raise ValueError. Both get chats, to which our template is applied. Raises ValueError.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the package lm-eval is not installed: pip install 'lm-eval[api]>=0.4.13'")
    import lm_eval
    import torch

    common: dict[str, Any] = {
        "tasks": list(tasks),
        "limit": limit,
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
    }
    results: dict[str, Any] | None
    if not is_url(target):
        results = lm_eval.simple_evaluate(
            "hf",
            model_args=_folder_arguments(target, condition),
            batch_size=batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",  # lm-eval's default is cuda, even without a GPU
            **common,
        )
    else:
        with reach(target, model=model, condition=condition, flags=()) as endpoint:
            arguments = {  # it takes the key from OPENAI_API_KEY, as `reach` does
                "base_url": f"{endpoint.url}/chat/completions",
                "model": endpoint.model,
                "num_concurrent": concurrency,
                "tokenizer_backend": None,
                "tokenized_requests": False,
            }
            template_options = None if condition is None else {"chat_template_kwargs": {"condition": condition}}
            try:
                results = lm_eval.simple_evaluate(
                    "local-chat-completions", model_args=arguments, gen_kwargs=template_options, **common
                )
            except NotImplementedError as error:  # raised for likelihoods, which no chat API gives
                raise ValueError(f"a URL cannot be asked for this task ({error}); name the model's folder") from None
    assert results is not None  # only ranks other than the first get none
    return results


def _folder_arguments(target: str, condition: str | None) -> dict[str, Any]:
    from ochat_train.serve.served import find_served  # loads transformers, which a URL does not need

    served = find_served(target, condition)
    if served.adapter is not None:
        raise ValueError(f"{served.folder} holds adapters alone; export the merged model, or serve it and name its URL")
    return {
        "pretrained": str(served.folder.absolute()),
        "max_length": served.num_positions,
        "chat_template_args": {"condition": served.condition},
    }
