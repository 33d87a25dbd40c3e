"""layer: the small kernels of a layer: norms, append, and rotary embedding fused with append."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from distributed_sparse.kernels.cache.append import append, rotary_append
from distributed_sparse.kernels.layer.rms_norm import add_rms_norm, rms_norm
from distributed_sparse.kernels.reference import (
    append_reference,
    quantise_reference,
    rms_norm_reference,
    rotary_reference,
)
from distributed_sparse.tools.bench.accuracy import check_close, check_equal
from distributed_sparse.tools.bench.layer import Inputs, newest_runs
from distributed_sparse.tools.bench.ops.base import Op
from distributed_sparse.tools.bench.rows import Row

EPS = 1e-5

KEY_BITS = 4

CHECKED_RUNS = 4
"""Pages of an append that are compared with the reference."""

CHECKED_TOKENS = 256
"""Tokens whose rotation is compared with the reference."""


class _WholeOp(Op):
    """A kernel whose result is small enough to be compared as a whole."""

    checks_whole = True

    @property
    def hidden(self) -> int:
        return self.shape.num_heads * self.shape.head_dim

    def drawn(self, generator: torch.Generator, *sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=self.shape.device).to(self.shape.dtype)


class RmsNorm(_WholeOp):
    """The norm of a decode step's hidden states; the hidden size is num_heads x head_dim."""

    name: ClassVar[str] = "rms_norm"
    axes = ("batch",)
    kernel, reference = staticmethod(rms_norm), staticmethod(rms_norm_reference)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        x, weight = self.drawn(generator, self.shape.batch, self.hidden), self.drawn(generator, self.hidden)
        return {"x": x, "weight": weight, "eps": EPS}

    def num_bytes(self) -> tuple[int, int]:
        """Read: the hidden states and the weight. Written: the normed states."""
        row = self.hidden * self.shape.dtype.itemsize
        return (self.shape.batch + 1) * row, self.shape.batch * row


class AddRmsNorm(_WholeOp):
    """The residual addition and the norm after it."""

    name: ClassVar[str] = "add_rms_norm"
    axes = ("batch",)
    kernel = staticmethod(add_rms_norm)

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        x, residual = (self.drawn(generator, self.shape.batch, self.hidden) for _ in range(2))
        return {"x": x, "residual": residual, "weight": self.drawn(generator, self.hidden), "eps": EPS}

    def reference(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return rms_norm_reference(total, weight, eps), total

    def num_bytes(self) -> tuple[int, int]:
        """Read: hidden states, residual and weight. Written: normed states and residual."""
        row = self.hidden * self.shape.dtype.itemsize
        return (2 * self.shape.batch + 1) * row, 2 * self.shape.batch * row


class _Append(Op):
    """Append K, V, the pages' min and max, and the 4-bit keys.

    The kernel writes what the pages hold already, so that other ops find them unchanged. Only before the checked run they are
    overwritten.
    """

    def run(self, arguments: dict[str, Any]) -> Any:
        append(**arguments)
        return arguments

    def _arguments(self, data: Inputs, k: Tensor, v: Tensor, pages: Tensor, offsets: Tensor, counts: Tensor) -> dict[str, Any]:
        ends = counts.cumsum(0)
        return {
            "k": k,
            "v": v,
            "pages": pages.int(),
            "starts": (ends - counts).int(),
            "offsets": offsets.int(),
            "counts": counts.int(),
            "k_pages": data.cache.k_pages,
            "v_pages": data.cache.v_pages,
            **{name: data.cache.metadata[name] for name in ("page_min_max", "key_codes", "key_scales")},
        }

    def before_check(self, arguments: dict[str, Any]) -> None:
        runs = (arguments[name].tolist() for name in ("pages", "offsets", "counts"))
        for page, offset, count in zip(*runs):
            for name in ("k_pages", "v_pages", "key_codes", "key_scales"):
                arguments[name][page, :, offset : offset + count] = 0
            if offset == 0:
                arguments["page_min_max"][page] = 0

    def _bytes(self, tokens: int, pages: int, min_max_read: int) -> tuple[int, int]:
        """Read: K, V, some pages' min and max. Written: K, V, codes and scales of every token, the pages' min and max."""
        shape = self.shape
        vectors = 2 * tokens * shape.num_kv_heads * shape.row_bytes
        copies = tokens * shape.num_kv_heads * (shape.head_dim * KEY_BITS // 8 + 4)
        bounds = shape.num_kv_heads * 2 * shape.row_bytes
        return vectors + min_max_read * bounds, vectors + copies + pages * bounds

    @property
    @abstractmethod
    def num_runs(self) -> int:
        """Pages that the kernel writes."""

    def compared(self, num_rows: int) -> str:
        return "all" if self.num_runs <= CHECKED_RUNS else f"{CHECKED_RUNS} of {self.num_runs} pages"

    def check(self, arguments: dict[str, Any], result: Any, rows: list[Row]) -> None:
        """Append some of the runs again, each to its page alone."""
        on_cpu = {name: x.cpu() for name, x in arguments.items() if name in ("pages", "starts", "offsets", "counts")}
        for t in torch.linspace(0, len(on_cpu["pages"]) - 1, CHECKED_RUNS).long().unique().tolist():
            page, start, offset, count = (int(on_cpu[name][t]) for name in ("pages", "starts", "offsets", "counts"))
            after = {name: arguments[name][page].cpu() for name in ("k_pages", "v_pages", "page_min_max")}
            k, v = (arguments[name][start : start + count].cpu() for name in "kv")
            run = torch.tensor([[0], [0], [offset], [count]])
            expected = append_reference(k, v, run[0], run[1], run[2], run[3], after["k_pages"][None], after["v_pages"][None])
            for name, found, exact in zip(after, after.values(), expected):
                check_equal(f"{self.name} ({name})", found, exact[0])
            where = slice(offset, offset + count)
            quantised = quantise_reference(k, KEY_BITS)
            for name, exact in zip(("key_codes", "key_scales"), quantised):
                check_equal(f"{self.name} ({name})", arguments[name][page, :, where].cpu().transpose(0, 1), exact)


class AppendStep(_Append):
    """One token per sequence, as in a decode step."""

    name: ClassVar[str] = "append step"
    axes = ("batch", "page_size")

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        runs = newest_runs(data)
        k, v = data.k[:, :, -1].contiguous(), data.v[:, :, -1].contiguous()
        return self._arguments(data, k, v, runs.pages, runs.offsets, runs.counts)

    def num_bytes(self) -> tuple[int, int]:
        return self._bytes(self.shape.batch, self.shape.batch, self.shape.batch)

    @property
    def num_runs(self) -> int:
        return self.shape.batch


class AppendPrompt(_Append):
    """A prompt chunk of `prefill_tokens`, cut to whole pages, at batch 1."""

    name: ClassVar[str] = "append prompt"
    axes = ("page_size",)

    @property
    def chunk(self) -> int:
        """Tokens."""
        size = self.shape.page_size
        return max(min(self.shape.prefill_tokens, self.shape.context) // size, 1) * size

    def arguments(self, data: Inputs, generator: torch.Generator) -> dict[str, Any]:
        pages = data.batch.page_table[0, : self.num_runs]
        caches = (data.cache.k_pages, data.cache.v_pages)  # each gather [T, H, S, d], then [T * S, H, d]
        k, v = (cache[pages.long()].transpose(1, 2).flatten(0, 1).contiguous() for cache in caches)
        return self._arguments(data, k, v, pages, torch.zeros_like(pages), torch.full_like(pages, self.shape.page_size))

    def num_bytes(self) -> tuple[int, int]:
        return self._bytes(self.chunk, self.num_runs, 0)

    @property
    def num_runs(self) -> int:
        return self.chunk // self.shape.page_size


class _RotaryAppend(_Append):
    """Rotary embedding of q and k fused with append, as in the engine.

    Timed at angles of 0, so that the pages do not change; a run at other angles is compared with the reference.
    """

    def _arguments(self, data: Inputs, k: Tensor, *rest: Tensor) -> dict[str, Any]:
        shape, none = self.shape, torch.zeros(len(k), self.shape.head_dim // 2, device=k.device)
        return {
            "q": k.repeat_interleave(shape.group, dim=1),
            "cos": none.cos(),
            "sin": none.sin(),
            **super()._arguments(data, k, *rest),
        }

    def run(self, arguments: dict[str, Any]) -> Any:
        return rotary_append(**arguments)

    def _bytes(self, tokens: int, pages: int, min_max_read: int) -> tuple[int, int]:
        """The bytes of append, the queries read and written, and two float32 per channel pair read."""
        shape = self.shape
        read, written = super()._bytes(tokens, pages, min_max_read)
        queries = tokens * shape.num_heads * shape.row_bytes
        return read + queries + 4 * tokens * shape.head_dim, written + queries

    def check(self, arguments: dict[str, Any], result: Any, rows: list[Row]) -> None:
        super().check(arguments, result, rows)
        angle = torch.linspace(-3, 3, arguments["cos"].numel(), device=arguments["cos"].device).view_as(arguments["cos"])
        turned = rotary_append(**{**arguments, "cos": angle.cos(), "sin": angle.sin()}, return_keys=True)
        for name, found in zip("qk", turned):
            assert found is not None
            x, cos, sin = (each[:CHECKED_TOKENS].cpu() for each in (arguments[name], angle.cos(), angle.sin()))
            expected = rotary_reference(x, cos, sin)
            check_close(f"{self.name} ({name})", found[:CHECKED_TOKENS], expected, self.max_error)
        self.run(arguments)  # restores all but the min and max of a page, which may have widened
        self._restore_min_max(arguments)

    def _restore_min_max(self, arguments: dict[str, Any]) -> None:
        pages = arguments["pages"].long()
        keys = arguments["k_pages"][pages]
        held = arguments["offsets"] + arguments["counts"]
        past = torch.arange(keys.shape[2], device=keys.device) >= held[:, None]
        low = keys.masked_fill(past[:, None, :, None], torch.inf).amin(2)
        high = keys.masked_fill(past[:, None, :, None], -torch.inf).amax(2)
        arguments["page_min_max"][pages] = torch.stack([low, high], dim=2)


class RotaryAppendStep(_RotaryAppend, AppendStep):
    """One token per sequence, as in a decode step."""

    name: ClassVar[str] = "rotary_append step"


class RotaryAppendPrompt(_RotaryAppend, AppendPrompt):
    """A prompt chunk, as in `AppendPrompt`."""

    name: ClassVar[str] = "rotary_append prompt"


OPS: tuple[type[Op], ...] = (RmsNorm, AddRmsNorm, AppendStep, AppendPrompt, RotaryAppendStep, RotaryAppendPrompt)
