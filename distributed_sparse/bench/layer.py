"""layer: one attention layer's decode step, select + attend, against torch SDPA over contiguous K and V in the same run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.bench.accuracy import MAX_ERROR, WrongResult, check_close
from distributed_sparse.bench.measure import read_bandwidth, time_in_turn
from distributed_sparse.kernels.reference import attend_reference, page_scores_reference
from distributed_sparse.selection import policy_class, resolve_sparse_config
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, attend_selection
from distributed_sparse.selection.metadata import AppendRuns, Geometry, LayerCache, Metadata
from distributed_sparse.selection.quest import QuestPolicy
from distributed_sparse.timer import Timer

PARTS = ("append", "score", "top_k", "estimate", "prune", "sample", "attend")
"""What a step is made of; `attend` holds the part that a policy attends itself."""


@dataclass(frozen=True)
class LayerSettings:
    """One layer's shape. `caches` are filled with different data and taken in turn, so that no processor cache holds one.

    Queries and values are standard normal, keys normal of standard deviation `key_spread`, which is that of the logits, too.
    Beside them every query head finds `heavy_tokens` tokens, anywhere in the context, whose logit is `heavy_logit`. With 0
    tokens attention is flat: the worst case of the adaptive methods. As few tokens are heavy, vAttention gets a smaller top-k
    and pilot than by default (.05 and .02).
    """

    context: int = 32768
    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    token_budget: int = 2048
    p: float = 0.95
    epsilon: float = 0.1
    delta: float = 0.1
    top_k_fraction: float = 0.02
    base_fraction: float = 0.008
    heavy_tokens: int = 8
    heavy_logit: float = 11.0
    key_spread: float = 0.5
    dtype: str = "float32"
    device: str = "cpu"
    caches: int = 3
    repeats: int = 21
    seed: int = 0


@dataclass
class Inputs:
    """Contents of one cache: k and v contiguous [B, H_kv, n, d] (or the newest token's alone), and in scattered pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    batch: DecodeBatch


@torch.inference_mode()  # as the engine decodes
def bench_layer(settings: LayerSettings) -> list[dict[str, Any]]:
    """Time SDPA, paged dense, Quest, Twilight, vAttention and the window; one row each.

    Rows hold: median ms and its 10th and 90th percentile, density, bytes by the formula, their time at the measured read
    bandwidth, the share of it that is reached, the speed over SDPA, and the ms of each of `PARTS` (taken apart, with a clock
    around every part).

    Raises:
        WrongResult: a result is off its float64 reference.
    """
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    group_size = settings.num_heads // settings.num_kv_heads
    geometry = Geometry(settings.num_kv_heads, group_size, settings.head_dim, settings.page_size, dtype, device, 0)
    methods = {name: _policy(name, keys, geometry) for name, keys in _methods(settings).items()}
    kinds = tuple(dict.fromkeys(kind for policy in methods.values() for kind in policy.metadata))
    inputs = [make_inputs(settings, geometry, kinds, settings.seed + number) for number in range(settings.caches)]

    def sdpa(number: int) -> Tensor:
        one = inputs[number % len(inputs)]
        return F.scaled_dot_product_attention(one.q.unflatten(1, (settings.num_kv_heads, group_size)), one.k, one.v)

    for policy in methods.values():
        check(inputs[0], policy, geometry)
    functions: dict[str, Any] = {"sdpa": sdpa}
    for name, policy in methods.items():
        functions[name] = lambda number, policy=policy: _decode(inputs[number % len(inputs)], policy, geometry)
    bandwidth = read_bandwidth(device)
    times = time_in_turn(functions, settings.repeats, device)
    rows: list[dict[str, Any]] = []
    all_tokens = settings.batch * settings.context * settings.num_kv_heads
    token_bytes = 2 * geometry.head_dim * geometry.dtype.itemsize
    for name in ("sdpa", *methods):
        selections = [] if name == "sdpa" else [_select(one, methods[name]) for one in inputs]
        tokens = (
            _mean(s.attended(one.batch.last_page_len, settings.page_size) for one, s in zip(inputs, selections)) or all_tokens
        )
        apart = _mean(s.read_apart for s in selections if s.read_apart is not None)
        scored = 0 if name == "sdpa" else methods[name].bytes_scored([settings.context] * settings.batch)
        num_bytes, seconds = (tokens + apart) * token_bytes + scored, times[name].median
        rows.append(
            {
                "method": name,
                **times[name].ms,
                "density": tokens / all_tokens,
                "MB": num_bytes / 1e6,
                "bytes_ms": num_bytes / bandwidth * 1e3,
                "bandwidth_share": num_bytes / seconds / bandwidth,
                "speedup_over_sdpa": times["sdpa"].median / seconds,
                "bytes_limit": all_tokens * token_bytes / num_bytes,
                "parts_ms": {} if name == "sdpa" else breakdown(inputs, methods[name], geometry, settings.repeats),
                "settings": asdict(settings),
                "read_bandwidth_GB_per_s": bandwidth / 1e9,
            }
        )
    return rows


def breakdown(inputs: list[Inputs], policy: Policy, geometry: Geometry, repeats: int) -> dict[str, float]:
    """Mean ms of a decode step's parts. The step's own token is appended, too, in place of the last one."""
    device = inputs[0].q.device
    for warm in (True, False):
        timer = policy.timer = Timer(device, enabled=not warm)
        for number in range(2 if warm else repeats):
            one = inputs[number % len(inputs)]
            newest = one.batch.context_lens.long() - 1
            rows = torch.arange(len(newest), dtype=torch.int32, device=device)
            page = one.batch.page_table.gather(1, (newest // geometry.page_size)[:, None])[:, 0]
            runs = AppendRuns(page, rows, (newest % geometry.page_size).int(), torch.ones_like(rows))
            with timer("append"):
                one.cache.append(one.k[:, :, -1], one.v[:, :, -1], runs)
            selection = _select(one, policy)
            with timer("attend"):
                _attend(one, selection, geometry)
            timer.steps += 1
    policy.timer = Timer(device)
    ms = timer.ms_per_step
    ms["attend"] += ms.pop("attend_chosen", 0.0)
    return {part: ms.get(part, 0.0) for part in PARTS}


def make_inputs(
    settings: LayerSettings, geometry: Geometry, kinds: tuple[Metadata, ...], seed: int, contiguous: bool = True
) -> Inputs:
    """Data as `LayerSettings` says, its pages scattered over the cache.

    Args:
        contiguous: keep K and V beside the pages, too; else of each sequence the newest token's alone.
    """
    generator, scatter = (torch.Generator(geometry.device).manual_seed(seed) for _ in range(2))
    n, page_size, heads = settings.context, settings.page_size, settings.num_kv_heads
    pages_each = -(-n // page_size)
    num_pages = settings.batch * pages_each + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=geometry.device).to(geometry.dtype)

    q = random(settings.batch, settings.num_heads, settings.head_dim)
    cache = LayerCache.allocate(0, num_pages, geometry, kinds)
    starts = torch.arange(pages_each, dtype=torch.int32, device=geometry.device) * page_size
    counts = (n - starts).clamp_max(page_size)
    table = torch.empty((settings.batch, pages_each), dtype=torch.int32, device=geometry.device)
    free = torch.randperm(num_pages - 1, generator=scatter, device=geometry.device).to(torch.int32) + 1
    kept_shape = (settings.batch, heads, n if contiguous else 1, settings.head_dim)
    kept_k, kept_v = (torch.empty(kept_shape, dtype=geometry.dtype, device=geometry.device) for _ in range(2))
    for row in range(settings.batch):
        k, v = random(heads, n, settings.head_dim), random(heads, n, settings.head_dim)
        k *= settings.key_spread
        for head in range(settings.num_heads if settings.heavy_tokens else 0):
            query = q[row, head].float()
            where = torch.randint(n, (settings.heavy_tokens,), generator=generator, device=geometry.device)
            along = query * (settings.heavy_logit / geometry.scale / query.square().sum())
            k[head // geometry.group_size, where] = along.to(geometry.dtype)
        table[row] = free[row * pages_each : (row + 1) * pages_each]
        runs = AppendRuns(table[row], starts, torch.zeros_like(starts), counts)
        cache.append(k.transpose(0, 1), v.transpose(0, 1), runs)
        kept_k[row], kept_v[row] = k[:, -kept_shape[2] :], v[:, -kept_shape[2] :]
    lengths = torch.full((settings.batch,), n, dtype=torch.int32, device=geometry.device)
    num_pages_each = torch.full_like(lengths, pages_each)
    key = torch.zeros(4, settings.batch, dtype=torch.int64, device=geometry.device)
    key[0], key[3] = torch.arange(settings.batch, device=geometry.device), n - 1
    batch = DecodeBatch(
        page_table=table,
        num_pages=num_pages_each,
        context_lens=lengths,
        last_page_len=lengths - (num_pages_each - 1) * page_size,
        random_key=key,
        max_context_len=n,
        page_size=page_size,
    )
    return Inputs(q, kept_k, kept_v, cache, batch)


def check(one: Inputs, policy: Policy, geometry: Geometry) -> None:
    """Compare a method's output with float64 attention over what it chose, and Quest's pages with float64 scores."""
    selection = _select(one, policy)
    if isinstance(policy, QuestPolicy):
        check_pages(one, policy, selection)
    out = _attend(one, selection, geometry).cpu()
    first = None if selection.partial_of is None else _reference(one, selection.partial_of, geometry, None)
    expected, _ = _reference(one, selection, geometry, first)
    check_close(type(policy).__name__, out, expected, MAX_ERROR[geometry.dtype])


def check_pages(one: Inputs, policy: QuestPolicy, selection: Selection) -> None:
    """Quest's pages against the float64 scores: as good as the best ones, to float32 rounding."""
    batch, config = one.batch, policy.config
    table, bounds = batch.page_table.cpu(), one.cache.metadata["page_min_max"].cpu()
    scores = page_scores_reference(one.q.cpu(), bounds, table, batch.num_pages.cpu(), config.group_reduction)
    scores[:, :, : config.sink_pages] = scores[:, :, scores.shape[2] - config.recent_pages :] = torch.inf
    k = -(-config.token_budget // batch.page_size)
    if k >= scores.shape[2]:
        return
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    pages = selection.pages[..., :k].cpu()
    chosen = (table[:, None, :, None] == pages[:, :, None, :]).any(-1)
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    if not ((chosen.sum(-1) == k).all() and (worst >= threshold - 1e-4 * threshold.abs()).all()):
        raise WrongResult("Quest chose other pages than the best by their float64 scores")


def _methods(settings: LayerSettings) -> dict[str, dict[str, Any]]:
    budget = {"token_budget": settings.token_budget}
    return {
        "dense": {},
        "quest": budget,
        "twilight": {"p": settings.p},
        "vattention": {key: getattr(settings, key) for key in ("epsilon", "delta", "top_k_fraction", "base_fraction")},
        "window": budget,
    }


def _policy(method: str, keys: dict[str, Any], geometry: Geometry) -> Policy:
    return policy_class(method)(resolve_sparse_config({"method": method, **keys}), geometry)


def _mean(counts: Iterable[Tensor]) -> float:
    """Mean over the caches of the tokens that all rows of one read; 0 without any."""
    sums = [float(of_rows.sum()) for of_rows in counts]
    return sum(sums) / len(sums) if sums else 0.0


def _reference(
    one: Inputs, selection: Selection, geometry: Geometry, partial: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    def on_cpu(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cpu()

    return attend_reference(
        one.q.cpu(),
        one.cache.k_pages.cpu(),
        one.cache.v_pages.cpu(),
        selection.pages.cpu(),
        selection.num_pages.cpu(),
        one.batch.last_page_len.cpu(),
        geometry.scale,
        tokens=on_cpu(selection.tokens),
        num_tokens=on_cpu(selection.num_tokens),
        log_weight=on_cpu(selection.log_weight),
        partial=partial,
    )


def _select(one: Inputs, policy: Policy) -> Selection:
    return policy.select(one.q, one.cache, one.batch)


def _attend(one: Inputs, selection: Selection, geometry: Geometry) -> Tensor:
    return attend_selection(one.q, one.cache, one.batch, selection, geometry.scale)


def _decode(one: Inputs, policy: Policy, geometry: Geometry) -> Tensor:
    return _attend(one, _select(one, policy), geometry)
