"""layer: one attention layer's decode step, select + attend, against torch SDPA over contiguous K and V in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.bench.measure import read_bandwidth, time_in_turn
from distributed_sparse.kernels.append import append
from distributed_sparse.kernels.attend import attend
from distributed_sparse.kernels.reference import attend_reference, page_scores_reference
from distributed_sparse.selection import policy_class, resolve_sparse_config
from distributed_sparse.selection.base import DecodeBatch, Geometry, LayerCache, PageMinMax, Policy, Selection
from distributed_sparse.selection.quest import QuestPolicy

MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""RMS error over RMS of the float64 result, above which no speed is printed."""


@dataclass(frozen=True)
class LayerSettings:
    """One layer's shape. `caches` are filled with different data and taken in turn, so that no processor cache holds one."""

    context: int = 32768
    batch: int = 1
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    token_budget: int = 2048
    dtype: str = "float32"
    device: str = "cpu"
    caches: int = 3
    repeats: int = 21
    seed: int = 0


@dataclass
class Inputs:
    """Random contents of one cache: contiguous [B, H_kv, n, d] and the same data in scattered pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    batch: DecodeBatch


def bench_layer(settings: LayerSettings) -> list[dict[str, Any]]:
    """Time SDPA, paged dense, Quest and the window; one row each.

    Rows hold: median ms and its 10th and 90th percentile, select and attend ms, bytes by the formula, GB/s, the share of the
    measured read bandwidth, and the speed over SDPA.

    Raises:
        AssertionError: a result is off its float64 reference.
    """
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    group_size = settings.num_heads // settings.num_kv_heads
    geometry = Geometry(settings.num_kv_heads, group_size, settings.head_dim, settings.page_size, dtype, device, 0)
    inputs = [make_inputs(settings, geometry, settings.seed + number) for number in range(settings.caches)]
    budget = {"token_budget": settings.token_budget}
    methods: dict[str, Policy] = {}
    for method, keys in {"dense": {}, "quest": budget, "window": budget}.items():
        config = resolve_sparse_config({"method": method, **keys})
        methods[method] = policy_class(method)(config, geometry)

    def sdpa(number: int) -> Tensor:
        one = inputs[number % len(inputs)]
        return F.scaled_dot_product_attention(one.q.unflatten(1, (settings.num_kv_heads, group_size)), one.k, one.v)

    for policy in methods.values():
        check(inputs[0], policy, geometry)
    functions: dict[str, Any] = {"sdpa": sdpa}
    for method, policy in methods.items():
        functions[method] = lambda number, policy=policy: _decode(inputs[number % len(inputs)], policy, geometry)
        functions[f"{method} select"] = lambda number, policy=policy: _select(inputs[number % len(inputs)], policy)
    bandwidth = read_bandwidth(device)
    times = time_in_turn(functions, settings.repeats, device)
    rows: list[dict[str, Any]] = []
    sdpa_bytes = layer_bytes(settings, geometry, None)
    for name in ("sdpa", *methods):
        seconds = times[name].median
        num_bytes = layer_bytes(settings, geometry, methods.get(name))
        low, high = times[name].spread
        rows.append(
            {
                "method": name,
                "ms": seconds * 1e3,
                "p10_ms": low * 1e3,
                "p90_ms": high * 1e3,
                "select_ms": times[f"{name} select"].median * 1e3 if name in methods else None,
                "MB": num_bytes / 1e6,
                "GB_per_s": num_bytes / seconds / 1e9,
                "bandwidth_share": num_bytes / seconds / bandwidth,
                "speedup_over_sdpa": times["sdpa"].median / seconds,
                "bytes_limit": sdpa_bytes / num_bytes,
                "settings": asdict(settings),
                "read_bandwidth_GB_per_s": bandwidth / 1e9,
            }
        )
    return rows


def layer_bytes(settings: LayerSettings, geometry: Geometry, policy: Policy | None) -> int:
    """Bytes that a step must read by the method's formula: K and V of what it attends, and the metadata that it scores."""
    budget = getattr(policy.config, "token_budget", settings.context) if policy is not None else settings.context
    attended = min(budget, settings.context)
    pages = -(-settings.context // settings.page_size)
    token_bytes = 2 * geometry.head_dim * geometry.dtype.itemsize * geometry.num_kv_heads
    return settings.batch * (attended * token_bytes + (policy.bytes_scored(pages) if policy else 0))


def make_inputs(settings: LayerSettings, geometry: Geometry, seed: int) -> Inputs:
    """Random data, its pages scattered over the cache."""
    generator = torch.Generator(geometry.device).manual_seed(seed)
    n, page_size, heads = settings.context, settings.page_size, settings.num_kv_heads
    pages_each = -(-n // page_size)
    num_pages = settings.batch * pages_each + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=geometry.device).to(geometry.dtype)

    k, v = random(settings.batch, heads, n, settings.head_dim), random(settings.batch, heads, n, settings.head_dim)
    shape = (num_pages, heads, page_size, settings.head_dim)
    cache = LayerCache(k.new_zeros(shape), v.new_zeros(shape), {PageMinMax: PageMinMax.allocate(num_pages, geometry)})
    table = (torch.randperm(num_pages - 1, generator=generator, device=geometry.device) + 1).to(torch.int32)
    table = table[: settings.batch * pages_each].view(settings.batch, pages_each)
    starts = torch.arange(pages_each, dtype=torch.int32, device=geometry.device) * page_size
    counts = (n - starts).clamp_max(page_size)
    for row in range(settings.batch):
        append(
            k[row].transpose(0, 1),
            v[row].transpose(0, 1),
            table[row],
            starts,
            torch.zeros_like(starts),
            counts,
            cache.k_pages,
            cache.v_pages,
            cache.page_min_max,
        )
    lengths = torch.full((settings.batch,), n, dtype=torch.int32, device=geometry.device)
    num_pages_each = torch.full_like(lengths, pages_each)
    batch = DecodeBatch(table, num_pages_each, lengths, lengths - (num_pages_each - 1) * page_size, n, page_size)
    return Inputs(random(settings.batch, settings.num_heads, settings.head_dim), k, v, cache, batch)


def check(one: Inputs, policy: Policy, geometry: Geometry) -> None:
    """Compare a method's output with float64 attention over the pages that it chose, and Quest's pages with float64 scores."""
    selection = _select(one, policy)
    if isinstance(policy, QuestPolicy):
        check_pages(one, policy, selection)
    out = _attend(one, selection, geometry).cpu()
    expected, _ = attend_reference(
        one.q.cpu(),
        one.cache.k_pages.cpu(),
        one.cache.v_pages.cpu(),
        selection.pages.cpu(),
        selection.num_pages.cpu(),
        one.batch.last_page_len.cpu(),
        geometry.scale,
    )
    error = ((out.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()
    assert error <= MAX_ERROR[geometry.dtype], f"{type(policy).__name__}: RMS error {error:.2e} of its own float64 result"


def check_pages(one: Inputs, policy: QuestPolicy, selection: Selection) -> None:
    """Quest's pages against the float64 scores: as good as the best ones, to float32 rounding."""
    cache, batch = one.cache, one.batch
    assert cache.page_min_max is not None
    table, config = batch.page_table.cpu(), policy.config
    scores = page_scores_reference(one.q.cpu(), cache.page_min_max.cpu(), table, batch.num_pages.cpu(), config.group_reduction)
    scores[:, :, : config.sink_pages] = scores[:, :, scores.shape[2] - config.recent_pages :] = torch.inf
    k = -(-config.token_budget // batch.page_size)
    if k >= scores.shape[2]:
        return
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    pages = selection.pages[..., :k].cpu()
    chosen = (table[:, None, :, None] == pages[:, :, None, :]).any(-1)
    worst = scores.masked_fill(~chosen, torch.inf).amin(-1, keepdim=True)
    assert (chosen.sum(-1) == k).all() and (worst >= threshold - 1e-4 * threshold.abs()).all(), "Quest chose other pages"


def _select(one: Inputs, policy: Policy) -> Selection:
    return policy.select(one.q, one.cache, one.batch)


def _attend(one: Inputs, selection: Selection, geometry: Geometry) -> Tensor:
    return attend(
        one.q,
        one.cache.k_pages,
        one.cache.v_pages,
        selection.pages,
        selection.num_pages,
        one.batch.last_page_len,
        geometry.scale,
    )


def _decode(one: Inputs, policy: Policy, geometry: Geometry) -> Tensor:
    return _attend(one, _select(one, policy), geometry)
