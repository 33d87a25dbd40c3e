"""Shard: one rank. Weights, cache and step(plan) -> StepResult; a plain class that knows neither Ray nor sockets."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.messages import (
    DecodeRow,
    Loaded,
    PrefillChunk,
    Ready,
    ShardReport,
    StepPlan,
    StepResult,
)
from distributed_sparse.model.checkpoint import resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_device, resolve_dtype, resolve_max_model_len
from distributed_sparse.model.sharding import LocalSizes, ShardSpec
from distributed_sparse.model.transformer import Transformer
from distributed_sparse.model.weights import load_weights
from distributed_sparse.selection import build_policies
from distributed_sparse.selection.metadata import Geometry
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.batch import build_batch
from distributed_sparse.shard.cache import PagedCache
from distributed_sparse.shard.collectives import Collectives
from distributed_sparse.shard.memory import check_kernels, max_pages
from distributed_sparse.shard.sampler import logprob_block, sample
from distributed_sparse.shard.slots import SlotTable
from distributed_sparse.shard.tracer import Tracer
from distributed_sparse.shard.warm_up import warm_up_plan

LOGPROB_ROWS = 256
"""Prompt rows whose logits are made at once: bounds the [rows, vocabulary] buffer."""


class Shard:
    """This rank's heads of the model, with their pages. Life: `load`, `allocate`, then `step` after `step`, `close`."""

    def __init__(self, config: EngineConfig, rank: int, world_size: int, collectives: Collectives) -> None:
        self.config = config
        self.spec = ShardSpec(rank, world_size)
        self.collectives = collectives
        self.device = resolve_device(config.device)
        self.num_pages = 0

    @torch.inference_mode()
    def load(self) -> Loaded:
        """Read this rank's weights; say what a page costs and how many fit.

        Raises:
            ValueError: the checkpoint, or the settings for it, are wrong; names what and the remedy.
        """
        config = self.config
        path = resolve_checkpoint(config.model, config.load_format)
        model = ModelConfig.from_pretrained(path)
        self.max_model_len = resolve_max_model_len(config.max_model_len, model)
        sizes = LocalSizes(model, self.spec)
        dtype = resolve_dtype(config.dtype, model.dtype)
        self.geometry = Geometry(
            num_kv_heads=sizes.num_key_value_heads,
            group_size=model.num_attention_heads // model.num_key_value_heads,
            head_dim=model.head_dim,
            page_size=config.page_size,
            dtype=dtype,
            device=self.device,
            first_kv_head=sizes.first_key_value_head,
            model_kv_heads=model.num_key_value_heads,
        )
        check_kernels(self.geometry)
        sparse = config.resolve_sparse()
        method = config.sparse["method"] if config.sparse else sparse.method
        self.policies = build_policies(method, sparse, model.num_hidden_layers, self.geometry)
        progress = self.spec.rank == 0
        weights = load_weights(path, model, self.spec, dtype, self.device, config.load_format, progress)
        self.model = Transformer(model, self.spec, weights, self.collectives)
        self.page_bytes = PagedCache.page_bytes(self.geometry, self.policies)
        with self._on_device():
            most = max_pages(config, self.device, sum(self.page_bytes), self.max_model_len, self._profile_memory)
        return Loaded(
            rank=self.spec.rank,
            device=str(self.device),
            kv_heads=(sizes.first_key_value_head, sizes.first_key_value_head + sizes.num_key_value_heads),
            weight_bytes=weights.nbytes,
            page_bytes=sum(self.page_bytes),
            max_pages=most,
            kept_pages=sparse.kept_pages(config.page_size),
            forks_copy_pages=any(kind.changes_when_read for policy in self.policies for kind in policy.metadata),
        )

    @torch.inference_mode()
    def allocate(self, num_pages: int) -> Ready:
        """Make the cache, and run one step of each kind through it, so that kernels are compiled before READY.

        A rank that outlives another keeps its cache: pages count as empty, since whoever is given one writes it from its start.
        """
        with self._on_device():
            if num_pages != self.num_pages:
                self._drop_cache()
                self._make_cache(num_pages)
                self.num_pages = num_pages
            self.slots = self._new_slots()
            self._warm_up()
        return Ready(
            rank=self.spec.rank, cache_bytes=num_pages * self.page_bytes[0], metadata_bytes=num_pages * self.page_bytes[1]
        )

    def _make_cache(self, num_pages: int) -> None:
        self.cache = PagedCache(num_pages, self.geometry, self.policies)
        self.attention = SparseAttention(self.geometry, self.policies, self.cache)
        self.slots = self._new_slots()

    def _new_slots(self) -> SlotTable:
        return SlotTable(self.config.max_num_seqs, -(-self.max_model_len // self.config.page_size), self.device)

    def _drop_cache(self) -> None:
        for name in ("cache", "attention", "slots"):
            self.__dict__.pop(name, None)

    def _profile_memory(self) -> None:
        """The largest step: all slots decode and sample over the longest context, beside a full budget of prompt tokens."""
        self._make_cache(1)
        most, each = self.config.max_num_batched_tokens, self.max_model_len
        chunk_lens = [min(each, most - start) for start in range(0, most, each)]
        num_targets = min(LOGPROB_ROWS, chunk_lens[0])
        plan = warm_up_plan(self.config.max_num_seqs, self.max_model_len, chunk_lens, num_targets)
        plan.decode[0].trace = self.config.trace  # rows are traced one after the other
        self.run(plan)
        self._drop_cache()

    def _warm_up(self) -> None:
        """Run every kernel once, on the null page; on a GPU this compiles them, the sparse path at its full width."""
        context_len = self.max_model_len if self.device.type == "cuda" else min(self.max_model_len, 2)
        self.run(warm_up_plan(1, context_len, [min(self.max_model_len, 32)]))
        for length in {context_len, 1}:  # a context of one token is dense with every method
            self.run(warm_up_plan(min(2, self.config.max_num_seqs), length, []))
        self.attention = SparseAttention(self.geometry, self.policies, self.cache)  # counts nothing of it
        self.collectives.reset_counts()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one plan.

        Returns:
            On rank 0 the sampled tokens and log-probabilities, in the plan's order; on the others an acknowledgement.
        """
        began, started = time.monotonic(), time.perf_counter()
        with self._on_device():
            result = self.run(plan)
            result.started = began
            if plan.report:
                result.report = self._report()
            if self.device.type == "cuda" and not result.tokens:
                torch.cuda.synchronize(self.device)  # a step is answered when it has been done, not when it has been queued
        result.step_ms = (time.perf_counter() - started) * 1e3
        return result

    def run(self, plan: StepPlan) -> StepResult:
        """The step itself: pages, forward pass, sampling."""
        result = StepResult(step=plan.step, rank=self.spec.rank)
        self.slots.apply(plan)
        self.cache.copy_pages(plan.page_copies)
        if not plan.decode and not plan.prefill:
            self.collectives.barrier()
            return result
        batch = build_batch(plan, self.slots, self.config.page_size)
        tracer = Tracer(self.geometry, plan.decode) if any(row.trace for row in plan.decode) else None
        self.attention.begin(batch, plan.profile, tracer)
        self.collectives.timer = self.attention.timer if plan.profile else None
        hidden = self.model.forward(batch.token_ids, batch.positions, batch.rope_lengths, self.attention)
        if plan.profile:
            self.attention.timer.steps += 1
        if tracer is not None:
            result.traces = tracer.blocks
        self._sample(plan, hidden, result)
        self._prompt_logprobs(plan, hidden, result)
        return result

    def _sample(self, plan: StepPlan, hidden: Tensor, result: StepResult) -> None:
        """Rank 0 samples and broadcasts, so ranks never diverge; every rank keeps the tokens as the next step's input."""
        rows, slots, positions = [], [], []
        for row, part in sampling_rows(plan):
            rows += [row] * len(part.samples)
            slots += part.samples
            positions += [part.end] * len(part.samples)
        if not rows:
            return
        unique = sorted(set(rows))
        logits = self.model.logits(hidden[torch.tensor(unique, device=self.device)])
        tokens = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        if self.spec.rank == 0:
            index = {row: place for place, row in enumerate(unique)}
            if len(unique) < len(rows):
                logits = logits[torch.tensor([index[row] for row in rows], device=self.device)]
            setups = [self.slots.setup(slot) for slot in slots]
            tokens = sample(logits, setups, positions)
            if any(setup.logprobs is not None for setup in setups):
                result.logprobs = [
                    logprob_block(slot, position, logits[i : i + 1], tokens[i : i + 1], setup.logprobs)
                    if setup.logprobs is not None
                    else None
                    for i, (slot, position, setup) in enumerate(zip(slots, positions, setups))
                ]
        tokens = self.collectives.broadcast(tokens)
        self.slots.remember(slots, tokens)
        if self.spec.rank == 0:
            result.tokens = tokens.tolist()

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens; every rank takes part, in blocks of rows, rank 0 keeps them."""
        for slot, first_row, first_position, targets, num_best in target_rows(plan):
            for start in range(0, len(targets), LOGPROB_ROWS):
                block = targets[start : start + LOGPROB_ROWS]
                logits = self.model.logits(hidden[first_row + start : first_row + start + len(block)])
                if self.spec.rank == 0:
                    tokens = torch.tensor(block, device=self.device)
                    position = first_position + start + 1
                    result.prompt_logprobs.append(
                        logprob_block(slot, position, logits, tokens, max(num_best, 0), full_width=num_best < 0)
                    )

    def _report(self) -> ShardReport:
        attention = self.attention
        rows_dense, rows_sparse = attention.rows
        return ShardReport(
            rows_dense=rows_dense,
            rows_sparse=rows_sparse,
            tokens_attended=attention.tokens_attended,
            tokens_in_context=attention.tokens_in_context,
            bytes_read=attention.bytes_read,
            all_reduce_calls=self.collectives.all_reduce_calls,
            all_reduce_bytes=self.collectives.all_reduce_bytes,
            time_ms=attention.timer.ms_per_step,
        )

    def close(self) -> None:
        """Leave the collective group and give the memory back. Harmless when called again."""
        self.collectives.close()
        self._drop_cache()
        self.__dict__.pop("model", None)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device, which each thread has its own of."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def sampling_rows(plan: StepPlan) -> Iterator[tuple[int, DecodeRow | PrefillChunk]]:
    """(row of the hidden states, the part of the plan whose last token it is) for each part that is sampled from."""
    row = 0
    for part in plan.parts:
        row += part.num_tokens
        if part.samples:
            yield row - 1, part


def target_rows(plan: StepPlan) -> Iterator[tuple[int, int, int, list[int], int]]:
    """(slot, first row, its position, the tokens that follow, best tokens beside each) where prompt_logprobs are wanted."""
    row = 0
    for decode_row in plan.decode:
        if decode_row.target is not None:
            yield decode_row.slot, row, decode_row.position, [decode_row.target], decode_row.prompt_logprobs
        row += 1
    for chunk in plan.prefill:
        if chunk.targets:
            yield chunk.slot, row, chunk.start, chunk.targets, chunk.prompt_logprobs
        row += len(chunk.tokens)
