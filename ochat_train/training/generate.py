"""Greedy answers of the model in training, in batches that all ranks share."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from ochat_train.model.alone import use_own_attention
from ochat_train.model.rope import OneByOne
from ochat_train.model.text_part import base_of, set_attention
from ochat_train.tokens.tokenizer import ChatTokenizer
from ochat_train.training.engine import World, is_any
from ochat_train.training.held_out import Interrupted

_MOST_ROWS = 64  # of a batch


class Prompt(NamedTuple):
    """The ids of a prompt, and the most tokens of its answer."""

    ids: list[int]
    max_new_tokens: int


class Answer(NamedTuple):
    """An answer's text, and whether it ends for its length."""

    text: str
    is_truncated: bool


@dataclass(frozen=True, slots=True)
class GreedyDecoder:
    """Answers by transformers' `generate` with a cache, each token the likeliest one; all ranks call it together.

    model: a PackedCausalLM or the DeepSpeed engine around it. capacity: tokens of a batch, prompts, answers and padding
    together. progress: called for each token. is_asked_to_stop: called before each batch.

    Prompts are padded on the left and masked, which changes an answer by no more than rounding. Where frequencies of
    positions depend on the longest sequence, or a model is run on each sequence alone, a batch has prompts of one
    length, and nothing is padded. Under ZeRO-3 each forward of a layer gathers its weights from all ranks, so that all
    decode as many tokens as the longest answer of any of them takes.
    """

    model: nn.Module
    tokenizer: ChatTokenizer
    capacity: int
    world: World
    progress: Callable[[], None] = lambda: None
    is_asked_to_stop: Callable[[], bool] = lambda: False

    def answers(self, prompts: Sequence[Prompt], update: Callable[[int], Any]) -> Iterator[tuple[int, Answer]]:
        """This rank's share of the answers, each with the position of its prompt. update: called with how many are new,
        of all ranks. Raises Interrupted on all ranks when one is asked to stop.
        """
        with self._generating() as (lm, is_split):
            batches = self._plan(prompts, needs_equal=self._needs_equal_lengths())
            for start in range(0, len(batches), self.world.size):
                if is_any(self.is_asked_to_stop(), self.world):
                    raise Interrupted
                together = batches[start : start + self.world.size]
                has_own = self.world.rank < len(together)
                if has_own or is_split:  # else other ranks would wait for this one
                    batch = together[self.world.rank if has_own else 0]
                    made = self._generate(lm, [prompts[place] for place in batch], is_split=is_split)
                    yield from zip(batch, made, strict=True) if has_own else ()
                update(sum(map(len, together)))

    def _needs_equal_lengths(self) -> bool:
        packed: Any = getattr(self.model, "module", self.model)
        forwards = (getattr(module, "forward", None) for module in packed.lm.modules())
        return packed.attention.backend == "alone" or any(isinstance(forward, OneByOne) for forward in forwards)

    def _plan(self, prompts: Sequence[Prompt], *, needs_equal: bool) -> list[list[int]]:
        """The positions of the prompts of each batch: of similar lengths, and no more than a rank's share."""
        order = sorted(range(len(prompts)), key=lambda place: (prompts[place].max_new_tokens, len(prompts[place].ids)))
        most = min(_MOST_ROWS, math.ceil(len(prompts) / self.world.size))
        batches: list[list[int]] = []
        for place in order:
            prompt = prompts[place]
            first = prompts[batches[-1][0]] if batches else prompt
            num_rows = min(most, self.capacity // (len(prompt.ids) + prompt.max_new_tokens))
            fits = bool(batches) and len(batches[-1]) < num_rows and first.max_new_tokens == prompt.max_new_tokens
            if fits and (not needs_equal or len(first.ids) == len(prompt.ids)):
                batches[-1].append(place)
            else:
                batches.append([place])
        return batches

    def _generate(self, lm: PreTrainedModel, prompts: Sequence[Prompt], *, is_split: bool) -> list[Answer]:
        length, end = max(len(prompt.ids) for prompt in prompts), self.tokenizer.end_id
        rows = [[end] * (length - len(prompt.ids)) + prompt.ids for prompt in prompts]
        mask = [[0] * (length - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
        lm.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=prompts[0].max_new_tokens, eos_token_id=end, pad_token_id=end
        )
        generate: Any = lm.generate
        device = self.world.device
        ids = generate(
            torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            synced_gpus=is_split,
        )[:, length:]
        answers = []
        for row in ids.tolist():
            num = row.index(end) if end in row else len(row)
            answers.append(
                Answer(self.tokenizer.pretrained.decode(row[:num], skip_special_tokens=True), num == len(row))
            )
        return answers

    @contextmanager
    def _generating(self) -> Iterator[tuple[PreTrainedModel, bool]]:
        """The language model as transformers made it, and whether its weights are split; after it, as it was."""
        packed: Any = getattr(self.model, "module", self.model)
        lm: PreTrainedModel = packed.lm
        attention, generation_config = base_of(lm).config._attn_implementation, lm.generation_config
        rotations: list[Any] = [
            module for module in lm.modules() if isinstance(getattr(module, "forward", None), OneByOne)
        ]
        offload = getattr(getattr(self.model, "optimizer", None), "parameter_offload", None)

        def begin(*_: Any) -> None:
            self.progress()
            if offload is not None:  # as DeepSpeed does when the forward of its own module begins
                offload.get_param_coordinator().reset_step()

        hook = lm.register_forward_pre_hook(begin)
        forwards = [module.forward for module in rotations]
        self.model.eval()
        use_own_attention(lm)
        for module, forward in zip(rotations, forwards, strict=True):
            module.forward = forward.forward
        try:
            with torch.compiler.set_stance("force_eager"):
                yield lm, offload is not None
        finally:
            hook.remove()
            for module, forward in zip(rotations, forwards, strict=True):
                module.forward = forward
            set_attention(lm, attention)
            lm.generation_config = generation_config
            self.model.train()
