"""signatures in torch: signs are summed as powers of two, then written with one scatter."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_signs_torch(x: Tensor) -> Tensor:
    """See `pack_signs`."""
    weights = torch.ones(32, dtype=torch.int32) << torch.arange(32, dtype=torch.int32)  # the last is the sign bit
    return ((x > 0).unflatten(-1, (-1, 32)) * weights).sum(-1, dtype=torch.int32)


def append_signatures_torch(
    x: Tensor, pages: Tensor, starts: Tensor, offsets: Tensor, counts: Tensor, signatures: Tensor
) -> None:
    """See `append_signatures`."""
    longest = int(counts.max()) if len(counts) else 0
    if longest == 0:
        return
    run, i = (torch.arange(longest) < counts[:, None]).nonzero(as_tuple=True)  # of each token, run after run
    packed = pack_signs_torch(x.index_select(0, starts.long()[run] + i))
    signatures[pages.long()[run], :, offsets.long()[run] + i] = packed.view(
        len(run), *signatures.shape[1:2], *signatures.shape[3:]
    )
