"""The kernels that are timed: their inputs, the bytes that they must move, and their float64 references."""

from __future__ import annotations

from distributed_sparse.tools.bench.ops.attention import AttendDense, AttendPages, AttendTokens, PrefillAttend
from distributed_sparse.tools.bench.ops.base import Op
from distributed_sparse.tools.bench.ops.layer import (
    AddRmsNorm,
    AppendPrompt,
    AppendStep,
    RmsNorm,
    RotaryAppendPrompt,
    RotaryAppendStep,
)
from distributed_sparse.tools.bench.ops.sampling import ResidualMoments, SampleResidual
from distributed_sparse.tools.bench.ops.selection import HammingScores, Int4Logits, PageScores, TopKPages, TopP

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        RmsNorm,
        AddRmsNorm,
        AppendStep,
        AppendPrompt,
        RotaryAppendStep,
        RotaryAppendPrompt,
        PageScores,
        TopKPages,
        Int4Logits,
        TopP,
        HammingScores,
        ResidualMoments,
        SampleResidual,
        AttendDense,
        AttendPages,
        AttendTokens,
        PrefillAttend,
    )
}
"""Op by name, in the order of the printed table."""
