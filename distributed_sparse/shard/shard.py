"""Shard: one tensor-parallel rank with its weights and cache; runs step plans. A plain class without Ray or sockets."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.cache import PagedCache
from distributed_sparse.config import EngineConfig
from distributed_sparse.model.checkpoint import resolve_checkpoint
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_device, resolve_dtype, resolve_max_model_len
from distributed_sparse.model.sharding import LocalSizes, ShardSpec
from distributed_sparse.model.transformer import Transformer
from distributed_sparse.model.weights import load_weights
from distributed_sparse.protocol.step import Loaded, Ready, ShardReport, StepPlan, StepResult
from distributed_sparse.selection import build_policies
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.batch import StepLayout, build_layout, make_batch
from distributed_sparse.shard.collectives.collectives import Collectives
from distributed_sparse.shard.graphs import DecodeGraphs, DecodeShapes, dense_until, held_bytes, why_eager
from distributed_sparse.shard.inputs import Arrays, StepInputs
from distributed_sparse.shard.logit_rows import LOGPROB_ROWS, LogitRows, fill_result, nan_logprobs
from distributed_sparse.shard.memory import check_kernels, max_pages, warm_up_plan
from distributed_sparse.shard.pending import PendingStep, StepWork
from distributed_sparse.shard.prefill_store import PrefillStore, check_folder, fingerprint
from distributed_sparse.shard.sampler import Draws, logprob_block, sample
from distributed_sparse.shard.slots import SlotTable
from distributed_sparse.shard.tracer import Tracer

logger = logging.getLogger(__name__)


class Shard:
    """This rank's heads of the model and their pages. Call `load`, `allocate`, then `begin` or `step` per step plan, `close`.

    Args:
        fixed_shapes: pad decode steps to the shapes of CUDA graphs even if none are captured, so that a CPU (or
            `enforce_eager`) computes what a captured step computes. Must be equal on all ranks.
    """

    def __init__(
        self, config: EngineConfig, rank: int, world_size: int, collectives: Collectives, *, fixed_shapes: bool = False
    ) -> None:
        self.config = config
        self.spec = ShardSpec(rank, world_size)
        self.collectives = collectives
        self.device = resolve_device(config.device)
        self.num_pages = 0
        self.graphs: DecodeGraphs | None = None
        self.prefill_store: PrefillStore | None = None
        self._fixed_shapes = fixed_shapes

    # ---- a step, in the order in which it runs

    def step(self, plan: StepPlan) -> StepResult:
        """Run one step plan to its end. Rank 0's result has the sampled tokens and log-probabilities, in the plan's order."""
        return self.begin(plan).result()

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> PendingStep:
        """Queue one step plan's work on the device. `PendingStep.result` returns what `step` returns.

        On a GPU a decode step does not synchronise, unless the step plan requests log-probabilities, traces, a report or times.
        """
        with self._on_device():
            work = StepWork(self.device)
            result, on_device = self.run(plan)
            if plan.report:
                result.report = self._report()
            return work.pending(result, on_device, lambda fetched: fill_result(result, plan, fetched))

    def run(self, plan: StepPlan) -> tuple[StepResult, dict[str, Tensor]]:
        """Update slots and pages, run the forward pass, sample.

        Returns:
            The result as far as the host knows it; on rank 0 also the tensors on the device that complete it (`fill_result`).
        """
        result = StepResult(step=plan.step, rank=self.spec.rank)
        timer = self.attention.timer
        timer.enabled = plan.profile
        timer.steps += plan.profile
        self.collectives.timer = timer if plan.profile else None
        with timer("shard"):
            changes = self.slots.apply(plan)
            if plan.page_copies:
                changes["copied_from"], changes["copied_to"] = np.array(plan.page_copies, dtype=np.int64).T
            if not plan.parts:
                if changes:
                    self._apply(self.inputs.upload(changes))
                self.collectives.barrier()
                return result, {}
            logit_rows = LogitRows.of(plan)
            arrays = logit_rows.arrays()
            if self.spec.rank == 0:
                draws = self.slots.sampling.draws(logit_rows.slots, logit_rows.positions, self.model.config.vocab_size)
                arrays |= {f"draws.{name}": array for name, array in draws.items()}
            hidden, logits, views = self._forward(plan, changes, arrays, result)
            on_device = self._sample(logit_rows, views, hidden, logits, result)
            self._prompt_logprobs(logit_rows, views, hidden, result)
            if self.spec.rank == 0 and any(part.num_tokens > 1 or not part.samples for part in plan.parts):
                # NaN check for rows that are not sampled, in one pass: the sum of a row is finite only if every element is.
                num_rows = sum(part.num_tokens for part in plan.parts)
                on_device["row_sums"] = hidden[:num_rows].sum(-1, dtype=torch.float32)
        return result, on_device

    def _apply(self, views: Mapping[str, Tensor]) -> None:
        """Write new pages into the device's page table, then copy pages."""
        if "new_pages" in views:
            self.slots.update(views["new_page_places"], views["new_pages"])
        if "copied_from" in views:
            self.cache.copy_pages(views["copied_from"], views["copied_to"])

    def _forward(
        self, plan: StepPlan, changes: Arrays, arrays: Arrays, result: StepResult
    ) -> tuple[Tensor, Tensor | None, Mapping[str, Tensor]]:
        """Upload the step's arrays, apply the changes, and run the model: by CUDA graph, eagerly, or with the prefill store.

        Args:
            changes: new and copied pages, see `_apply`; arrays: the inputs of sampling.

        Returns:
            Hidden states [N, D], padded decode rows included; all their logits if a fixed shape ran; `arrays` on the device.
        """
        if plan.prefill and self.prefill_store is not None:
            self._apply(self.inputs.upload(changes))
            hidden = self.prefill_store.forward(self, plan, result)
            return hidden, None, self.inputs.upload(arrays)
        shape = self.graphs.shapes.of(plan) if self.graphs is not None else None
        layout = build_layout(plan, self.slots, self.config.page_size, None if shape is None else shape.num_rows)
        # The layout's arrays come first: a captured step reads them at the same addresses in every step.
        views = self.inputs.upload({**layout.arrays, **changes, **arrays})
        self._apply(views)
        if shape is None:
            return self.forward_eager(plan, layout, views, result), None, views
        assert self.graphs is not None
        return *self.graphs.run(shape, layout, views), views

    def forward_eager(self, plan: StepPlan, layout: StepLayout, views: Mapping[str, Tensor], result: StepResult) -> Tensor:
        """Run the model over any step plan, without padding: hidden states [N, D]."""
        batch = make_batch(layout, views, self.slots, self.config.page_size)
        tracer = Tracer(self.geometry, plan.decode) if layout.trace else None
        self.attention.begin(batch, tracer)
        hidden = self.model.forward(batch.token_ids, batch.positions, batch.rope_lengths, self.attention)
        self.attention.account(layout.context_lens, layout.max_context_len, self.attention.dense_layers)
        if tracer is not None:
            result.traces = tracer.blocks
        return hidden

    def _sample(
        self, logit_rows: LogitRows, views: Mapping[str, Tensor], hidden: Tensor, logits: Tensor | None, result: StepResult
    ) -> dict[str, Tensor]:
        """Sample on rank 0 and broadcast, so that ranks never diverge. Every rank keeps the tokens as the next step's input.

        Returns:
            On rank 0 the sampled tokens int64 [R] and their scores float32 [R], if R > 0.
        """
        if not logit_rows.rows.size:
            return {}
        if logits is None:
            logits = self.model.logits(logit_rows.distinct_rows(hidden, views))
        else:
            logits = logit_rows.distinct_rows(logits, views)
        tokens = torch.empty(len(logit_rows.rows), dtype=torch.int64, device=self.device)
        on_device = {}
        if self.spec.rank == 0:
            if "drawn_places" in views:
                logits = logits.index_select(0, views["drawn_places"])
            draws = {name.removeprefix("draws."): views[name] for name in views if name.startswith("draws.")}
            tokens, on_device["scores"] = sample(logits, Draws(**draws))
            on_device["tokens"] = tokens
            num_best = self.slots.sampling.logprobs[logit_rows.slots].tolist()
            if max(num_best) >= 0:
                sampled = zip(logit_rows.slots.tolist(), logit_rows.positions.tolist(), num_best)
                result.logprobs = [
                    logprob_block(slot, position, logits[i : i + 1], tokens[i : i + 1], best) if best >= 0 else None
                    for i, (slot, position, best) in enumerate(sampled)
                ]
                result.bad_logits += [bad for block in result.logprobs if block is not None for bad in nan_logprobs(block)]
        tokens = self.collectives.broadcast(tokens)
        self.slots.remember(views["drawn_slots"], tokens)
        return on_device

    def _prompt_logprobs(self, logit_rows: LogitRows, views: Mapping[str, Tensor], hidden: Tensor, result: StepResult) -> None:
        """Log-probabilities of prompt tokens, block by block. All ranks compute the logits; rank 0 keeps the results."""
        for block in logit_rows.blocks:
            logits = self.model.logits(hidden[block.first_row : block.first_row + block.num_rows])
            if self.spec.rank == 0:
                tokens = views["targets"][block.first_target : block.first_target + block.num_rows]
                best, full_width = max(block.num_best, 0), block.num_best < 0
                found = logprob_block(block.slot, block.position, logits, tokens, best, full_width)
                result.prompt_logprobs.append(found)
                result.bad_logits += nan_logprobs(found)

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

    # ---- start-up and shutdown

    @torch.inference_mode()
    def load(self) -> Loaded:
        """Read this rank's weights; return the bytes of a page and the number of pages that fit.

        Raises:
            ValueError: the checkpoint or a setting is wrong; names it and the remedy.
        """
        config = self.config
        if config.prefill_store is not None:
            check_folder(config.prefill_store)
        path = resolve_checkpoint(config.model, config.load_format)
        model = ModelConfig.from_pretrained(path)
        self.max_model_len = resolve_max_model_len(config.max_model_len, model)
        sizes = LocalSizes(model, self.spec)
        dtype = resolve_dtype(config.dtype, model.dtype)
        self.geometry = sizes.geometry(config.page_size, dtype, self.device)
        check_kernels(self.geometry)
        sparse = config.resolve_sparse()
        method = config.sparse["method"] if config.sparse else sparse.method
        self.policies = build_policies(method, sparse, model.num_hidden_layers, self.geometry)
        progress = config.use_tqdm_on_load and self.spec.rank == 0
        weights = load_weights(path, model, self.spec, dtype, self.device, config.load_format, progress)
        self.model = Transformer(model, self.spec, weights, self.collectives)
        self.inputs = StepInputs(64 * config.max_num_batched_tokens + 512 * config.max_num_seqs + (64 << 10), self.device)
        self._captures = self._captures_graphs(method)
        self.page_bytes = PagedCache.page_bytes(self.geometry, [policy.metadata for policy in self.policies])
        with self._on_device():
            most = max_pages(config, self.device, sum(self.page_bytes), self.max_model_len, self._profile_memory)
        return Loaded(
            rank=self.spec.rank,
            device=str(self.device),
            dtype=str(dtype).removeprefix("torch."),
            kv_heads=(sizes.first_key_value_head, sizes.first_key_value_head + sizes.num_key_value_heads),
            weight_bytes=weights.nbytes,
            page_bytes=sum(self.page_bytes),
            max_pages=most,
            evict_window=sparse.evict_window(config.page_size),
            copy_on_fork=any(kind.changes_when_read for policy in self.policies for kind in policy.metadata),
        )

    @torch.inference_mode()
    def allocate(self, num_pages: int) -> Ready:
        """Allocate the cache, warm up every kernel, capture CUDA graphs. Nothing slow is left for the first step.

        After another rank's failure, the surviving ranks call this again. They keep their cache: its pages count as empty, as a
        sequence writes every page from offset 0. Graphs are captured anew, as slots and communicator are new.
        """
        with self._on_device():
            self._drop_graphs()
            self.prefill_store = None  # the store keeps no warm-up chunks
            if num_pages != self.num_pages:
                self._drop_cache()
                self._make_cache(num_pages)
                self.num_pages = num_pages
            self.slots = self._new_slots()
            self._warm_up()
            self.attention.reset()  # counters exclude the warm-up
            if self._captures or self._fixed_shapes:
                self.graphs = self._new_graphs()
                self.graphs.prepare(self.graphs.shapes)
            if self.config.prefill_store is not None:
                self.prefill_store = self._new_prefill_store(self.config.prefill_store)
            self.collectives.reset_counts()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # raises here if a kernel of the warm-up failed
        return Ready(
            rank=self.spec.rank, cache_bytes=num_pages * self.page_bytes[0], metadata_bytes=num_pages * self.page_bytes[1]
        )

    def close(self) -> None:
        """Leave the collective group and free the memory. May be called more than once."""
        self._drop_graphs()  # before the communicator that they hold
        self.collectives.close()
        self._drop_cache()
        self.__dict__.pop("model", None)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _make_cache(self, num_pages: int) -> None:
        self.cache = PagedCache(num_pages, self.geometry, [policy.metadata for policy in self.policies])
        self.attention = SparseAttention(self.geometry, self.policies, self.cache)

    def _drop_cache(self) -> None:
        for name in ("cache", "attention", "slots"):
            self.__dict__.pop(name, None)

    def _new_slots(self) -> SlotTable:
        return SlotTable(self.config.max_num_seqs, -(-self.max_model_len // self.config.page_size), self.device)

    def _new_prefill_store(self, folder: str) -> PrefillStore:
        own = np.frombuffer(self._fingerprint, dtype=np.uint8).copy()
        identity = self.collectives.all_gather(torch.from_numpy(own).to(self.device)[None])
        return PrefillStore(folder, bytes(identity[0].tolist()), self.model, self.geometry, len(self.policies))

    @cached_property
    def _fingerprint(self) -> bytes:
        return fingerprint(self.model, self.geometry, self.config.load_format)

    def _profile_memory(self) -> int:
        """Run the largest step: all slots decode and sample at the longest context, beside a full budget of prompt tokens.

        Returns:
            Bytes that CUDA graphs will hold in addition.
        """
        self._make_cache(1)
        self.slots = self._new_slots()
        most, each = self.config.max_num_batched_tokens, self.max_model_len
        chunk_lens = [min(each, most - start) for start in range(0, most, each)]
        num_targets = min(LOGPROB_ROWS, chunk_lens[0])
        plan = warm_up_plan(self.config.max_num_seqs, self.max_model_len, chunk_lens, num_targets)
        plan.decode[0].trace = self.config.trace  # one row suffices: rows are traced one after another
        self.run(plan)
        self.attention.forget()
        graph_bytes = held_bytes(self._new_graphs, self.device) if self._captures else 0
        self._drop_cache()
        return graph_bytes

    def _warm_up(self) -> None:
        """Run every kernel once, on the null page. On a GPU this compiles them, the sparse ones at full width."""
        context_len = self.max_model_len if self.device.type == "cuda" else min(self.max_model_len, 2)
        self.run(warm_up_plan(1, context_len, [min(self.max_model_len, 32)]))
        for length in {context_len, 1}:  # a context of one token is dense with every method
            self.run(warm_up_plan(min(2, self.config.max_num_seqs), length, []))

    def _captures_graphs(self, method: str) -> bool:
        if self.device.type != "cuda":
            return False
        reason = why_eager(self.config.enforce_eager, self.policies, method)
        if reason is not None and self.spec.rank == 0:
            level = logging.INFO if self.config.enforce_eager else logging.WARNING
            logger.log(level, "no CUDA graphs, decode is slower: %s", reason)
        return reason is None

    def _new_graphs(self) -> DecodeGraphs:
        longest_dense = dense_until(self.policies, self.config.page_size, self.max_model_len)
        shapes = DecodeShapes(self.config.max_num_seqs, longest_dense, self.max_model_len)
        return DecodeGraphs(shapes, self.model, self.attention, self.slots, self.inputs, self.collectives, self._captures)

    def _drop_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.close()
        self.graphs = None

    def _on_device(self) -> AbstractContextManager[object]:
        """Make this rank's GPU the current device, which is per thread: kernels launch on it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
