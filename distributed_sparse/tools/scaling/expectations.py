"""expectations: bytes held, bytes sent and tokens attended of a point, from the model's shape and the settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import resolve_dtype
from distributed_sparse.selection import layer_configs
from distributed_sparse.tools.common.latency import RequestTimes
from distributed_sparse.tools.evaluation.meter import decode_contexts
from distributed_sparse.tools.planner.rank import RankCostModel
from distributed_sparse.tools.scaling.grid import Point


def expectations(point: Point, model: ModelConfig, times: Sequence[RequestTimes]) -> dict[str, Any]:
    """The counts that the engine must report: a rank's share by the cost model, all ranks' weights by this file's own formulas.

    Returns:
        The expectations of `checks`: "weight_bytes" of a rank, "weight_bytes_of_all_ranks", "page_bytes_of_all_ranks",
        "all_reduce", "density" per layer (None: depends on the data) and "density_at_most"; and "weight_bytes_read_per_step".
    """
    engine, num_ranks = point.engine, point.engine.tensor_parallel_size
    dtype = resolve_dtype(engine.dtype, model.dtype)
    whole, own = (RankCostModel(model, size, engine.sparse, engine.page_size, dtype) for size in (1, num_ranks))
    tokens = sum(one.num_prompt_tokens + len(one.token_ids) - 1 for one in times)  # the last token is never an input
    contexts = contexts_of(times)
    density, at_most = [], []
    for layer in layer_configs(engine.resolve_sparse(), model.num_hidden_layers, engine.page_size):
        attended = [layer.attended_tokens(context, engine.page_size) for context in contexts]
        known = [count for count in attended if count is not None]
        density.append(sum(known) / sum(contexts) if contexts and len(known) == len(attended) else None)
        most = [layer.most_attended_tokens(context, engine.page_size) for context in contexts]
        at_most.append(sum(most) / sum(contexts) if contexts else 1.0)
    added = replicated_elements(model) * (num_ranks - 1) + padding_elements(model, num_ranks)
    return {
        "weight_bytes": own.weight_bytes,
        "weight_bytes_of_all_ranks": whole.weight_bytes + added * dtype.itemsize,
        "page_bytes_of_all_ranks": dict(zip(("cache_bytes", "metadata_bytes"), whole.page_bytes)),
        "all_reduce": {
            "calls_per_step": own.all_reduce_calls,
            "bytes": own.all_reduce_calls * own.all_reduce_bytes_each(tokens),
        },
        "density": density,
        "density_at_most": at_most,
        "weight_bytes_read_per_step": own.weight_bytes_read(point.workload.batch),
    }


def replicated_elements(model: ModelConfig) -> int:
    """Weights that every rank holds in full: the norms, and the biases added after the sum over ranks."""
    of_layer = 2 * model.hidden_size  # before attention, before the MLP
    of_layer += 2 * model.head_dim if model.qk_norm else 0
    of_layer += model.hidden_size * (model.o_bias + model.mlp_bias)
    return model.num_hidden_layers * of_layer + model.hidden_size


def padding_elements(model: ModelConfig, num_ranks: int) -> int:
    """Padding over all ranks that makes the slices of the vocabulary and of the MLP equal."""
    rows, inner = -model.vocab_size % num_ranks, -model.intermediate_size % num_ranks
    vocabularies = 1 if model.tie_word_embeddings else 2
    of_inner = 3 * model.hidden_size + (2 if model.mlp_bias else 0)  # gate, up and down; biases of gate and up
    return vocabularies * rows * model.hidden_size + model.num_hidden_layers * inner * of_inner


def contexts_of(times: Sequence[RequestTimes]) -> list[int]:
    """Context length of every decode step of every request."""
    return [n for one in times for n in decode_contexts(one.num_prompt_tokens, 0, len(one.token_ids))]
