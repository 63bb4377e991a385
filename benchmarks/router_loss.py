"""How far the router loss of micro-batches is from that of a whole step, on a small mixture that was trained a bit.

    python benchmarks/router_loss.py

Of each size of micro-batches, over steps of 8 of them: the loss, and how far its gradient is from that of the step as
one batch, relative to its norm; and what both change in the whole gradient with a coefficient of 0.001 and 0.02.
"""

from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import describe_machine, write_results
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

ROOT = Path(__file__).resolve().parents[1]
LENGTH, MICRO_BATCHES, STEPS, TRAINED, EXPERTS, CHOSEN = 64, 8, 5, 150, 16, 4
COEFFICIENTS = (0.001, 0.02)


def read_ids() -> Tensor:
    """i64[N, LENGTH]: bytes of this project's pages, its code, and the quickstart's conversations."""
    files = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("ochat_train/model/*.py"), ROOT / "data/quickstart.json"]
    ids = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in sorted(files))), dtype=torch.uint8)
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).long()


def gradients(model: PreTrainedModel, loss: Tensor, *, keeps_graph: bool = False) -> Tensor:
    """All of them as one vector."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=keeps_graph, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def shares_of(logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of [tokens, E] of each layer: how often an expert was chosen, and its mean probability, over all layers."""
    probabilities = torch.cat(logits).softmax(-1)
    chosen = F.one_hot(probabilities.topk(CHOSEN).indices, EXPERTS).sum(1).float()
    return chosen.mean(0), probabilities.mean(0)


def main() -> None:
    """Train the mixture, and compare."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ids = read_ids()
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=64,
            moe_intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            router_aux_loss_coef=COEFFICIENTS[0],
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(TRAINED):
        batch = ids[torch.randint(len(ids), (16,))]
        loss = model(batch, labels=batch, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows: list[dict[str, Any]] = []
    for sequences in (1, 4, 16, 64):
        found = [compare(model, ids[torch.randint(len(ids), (MICRO_BATCHES, sequences))]) for _ in range(STEPS)]
        rows.append({name: median(each[name] for each in found) for name in found[0]})
        print(rows[-1])
    results = {"trained_loss": float(loss.detach()), "rows": rows}
    write_results("router_loss", describe_machine(("torch", "transformers")) | results)


def compare(model: PreTrainedModel, batches: Tensor) -> dict[str, float]:
    """One step of micro-batches, i64[M, n, LENGTH]."""
    with torch.no_grad():  # the counting pass
        whole = shares_of(model(batches.flatten(0, 1), output_router_logits=True).router_logits)
    by_part = by_step = of_tokens = torch.zeros(())
    loss = 0.0
    for batch in batches:
        out = model(batch, labels=batch, output_router_logits=True)
        chosen, probabilities = shares_of(out.router_logits)
        part = EXPERTS * (chosen * probabilities).sum() / len(batches)
        by_part = by_part + gradients(model, part, keeps_graph=True)
        by_step = by_step + gradients(
            model, EXPERTS * (whole[0] * probabilities).sum() / len(batches), keeps_graph=True
        )
        nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()) / len(batches)
        of_tokens = of_tokens + gradients(model, nll)
        loss += float(part.detach())
    change = (by_part - by_step).norm()
    return {
        "tokens_of_a_micro_batch": batches[0].numel(),
        "loss": loss,
        "loss_of_the_step": float(EXPERTS * (whole[0] * whole[1]).sum()),
        "cosine": float(F.cosine_similarity(by_part, by_step, dim=0)),
        "length_of_gradient": float(by_part.norm() / by_step.norm()),
        **{f"change_at_{c:g}": float(c * change / (of_tokens + c * by_step).norm()) for c in COEFFICIENTS},
    }


if __name__ == "__main__":
    main()
