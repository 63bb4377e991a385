"""Batches on their way to the GPU. Needs a GPU: pytest -m gpu tests/gpu."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from ochat_train.tokens.batch import collate
from ochat_train.tokens.encode import Example

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available"),
]


def test_a_pinned_batch_is_copied_while_the_host_goes_on_and_arrives_whole() -> None:
    length = 2**22  # 100 MB over all tensors: a copy that lasts some milliseconds
    ids = np.random.default_rng(0).integers(0, 2**31, length).astype(np.int32)
    batch = collate([Example(ids, np.ones(length, np.float32))], [0])
    pinned = batch.pin(torch.device("cuda", 0))
    tensors = [field.name for field in fields(batch) if field.name != "max_seqlen"]
    assert all(getattr(pinned, name).is_pinned() for name in tensors)
    pinned.to("cuda")  # the first use of the device takes longer
    torch.cuda.synchronize()
    event = torch.cuda.Event()
    moved = pinned.to("cuda")
    event.record()
    assert not event.query()  # the copy is still on its way
    for name in tensors:
        before, after = getattr(batch, name), getattr(moved, name)
        assert isinstance(after, Tensor) and torch.equal(before, after.cpu())
