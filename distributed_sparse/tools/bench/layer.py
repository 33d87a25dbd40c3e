"""layer: one attention layer's decode step (select, attend) beside torch SDPA over contiguous K and V in the same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata
from distributed_sparse.kernels.reference import attend_reference, page_scores_reference
from distributed_sparse.selection import policy_class, resolve_sparse_config
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, attend_selection
from distributed_sparse.selection.quest import QuestPolicy
from distributed_sparse.tools.bench.accuracy import MAX_ERROR, WrongResult, check_close
from distributed_sparse.tools.bench.failures import caught
from distributed_sparse.tools.bench.rows import Row
from distributed_sparse.tools.bench.timing import Times, Unavailable, check_memory, read_bandwidth, time_in_turn
from distributed_sparse.utils.timer import Timer

PARTS = ("append", "score", "top_k", "estimate", "prune", "sample", "attend")
"""Parts of a step; `attend` includes the part that a policy attends itself."""

LARGE_CACHE_BYTES = 1 << 30
"""One cache of this size is enough: no processor cache holds it, and every set of queries selects other pages."""

CONTIGUOUS_SHARE = 0.9
"""K and V are also kept contiguous, for peers that need that, if everything takes at most this share of free memory."""

CHECKED_SEQUENCES = 2
"""Sequences of a batch that are compared with float64 attention, which runs on the CPU row by row."""


@dataclass(frozen=True)
class LayerSettings:
    """One layer's shape and data.

    `caches` caches of different data are used in turn, so that no processor cache holds one. A cache of `LARGE_CACHE_BYTES` or
    more is used alone, with as many sets of queries.

    Queries and values are standard normal. Keys are normal of standard deviation `key_spread`, which is then that of the logits
    too. In addition, every query head has `heavy_tokens` tokens anywhere in the context whose logit is `heavy_logit`; with 0 of
    them attention is flat, the worst case of the adaptive methods. Because few tokens are heavy, vAttention's top-k and pilot
    are smaller than its defaults (.05 and .02).
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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--num-heads {self.num_heads} is no multiple of --num-kv-heads {self.num_kv_heads}")
        for name, keys in _methods(self).items():
            resolve_sparse_config({"method": name, **keys}).check(self.page_size)

    @classmethod
    def of(cls, geometry: Geometry, context: int, batch: int, **more: Any) -> LayerSettings:
        """Settings with a geometry's heads and page size."""
        return cls(
            context=context,
            batch=batch,
            num_heads=geometry.num_kv_heads * geometry.group_size,
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            page_size=geometry.page_size,
            **more,
        )


@dataclass
class Inputs:
    """One cache and its queries: k and v contiguous [B, H_kv, n, d] (n = 1: the newest token's alone) and in pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    batch: DecodeBatch


@torch.inference_mode()  # as the engine decodes
def bench_layer(settings: LayerSettings) -> list[dict[str, Any]]:
    """Time SDPA, paged dense, Quest, Twilight, vAttention and the window, one row each.

    Returns:
        Rows of "method" and either median ms with 10th and 90th percentile, "launched" (`Times.launched`), density, bytes by
        the formula, their time at the measured read bandwidth, the share of that bandwidth, the speedup over SDPA, and the ms
        of each of `PARTS` (from a separate run that times each part); or "unavailable" with the reason; or "wrong" with the
        difference from the float64 result or the failure.

    Raises:
        Unavailable: the caches do not fit into memory.
    """
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    group_size = settings.num_heads // settings.num_kv_heads
    geometry = Geometry(settings.num_kv_heads, group_size, settings.head_dim, settings.page_size, dtype, device, 0)
    methods: dict[str, Policy] = {
        name: policy_class(name)(resolve_sparse_config({"method": name, **keys}), geometry)
        for name, keys in _methods(settings).items()
    }
    kinds = tuple(dict.fromkeys(kind for policy in methods.values() for kind in policy.metadata))
    inputs = make_rotation(settings, geometry, kinds)
    failed = _failures(methods, inputs[0], geometry)
    functions: dict[str, Any] = {
        name: lambda number, policy=policy: _decode(inputs[number % len(inputs)], policy, geometry)
        for name, policy in methods.items()
        if name not in failed
    }
    if "sdpa" not in failed:
        functions = {"sdpa": lambda number: _sdpa(inputs[number % len(inputs)])} | functions
    bandwidth = read_bandwidth(device)
    times = time_in_turn(functions, settings.repeats, device, rotation=len(inputs))
    rows: list[dict[str, Any]] = []
    for name in ("sdpa", *methods):
        row = failed.get(name) or _row(name, methods.get(name), inputs, times, geometry, bandwidth, settings)
        rows.append({"method": name, **row, "settings": asdict(settings), "read_bandwidth_GB_per_s": bandwidth / 1e9})
    return rows


def _failures(methods: dict[str, Policy], one: Inputs, geometry: Geometry) -> dict[str, dict[str, str]]:
    """Methods that are not timed: name -> "wrong" or "unavailable" with the reason."""
    failed: dict[str, dict[str, str]] = {}
    if one.k.shape[2] != one.batch.max_context_len:
        failed["sdpa"] = {"unavailable": "out of memory: no room for contiguous K and V beside the pages"}
    for name, policy in methods.items():
        with caught(name) as found:
            check(one, policy, geometry)
        if found:
            failed[name] = found
    return failed


def _row(
    name: str,
    policy: Policy | None,
    inputs: list[Inputs],
    times: dict[str, Times],
    geometry: Geometry,
    bandwidth: float,
    settings: LayerSettings,
) -> dict[str, Any]:
    """The times of a method (policy None: SDPA) beside its bytes."""
    all_tokens = settings.batch * settings.context * settings.num_kv_heads
    token_bytes = 2 * geometry.head_dim * geometry.dtype.itemsize
    tokens, apart, scored = float(all_tokens), 0.0, 0
    if policy is not None:
        selections = [policy.select(one.q, one.cache, one.batch) for one in inputs]
        tokens, apart = mean_tokens(inputs, selections)
        scored = policy.bytes_scored([settings.context] * settings.batch)
    num_bytes, seconds = (tokens + apart) * token_bytes + scored, times[name].median
    return {
        **times[name].ms,
        "launched": times[name].launched,
        "density": tokens / all_tokens,
        "MB": num_bytes / 1e6,
        "bytes_ms": num_bytes / bandwidth * 1e3,
        "bandwidth_share": num_bytes / seconds / bandwidth,
        "speedup_over_sdpa": times["sdpa"].median / seconds if "sdpa" in times else None,
        "bytes_limit": all_tokens * token_bytes / num_bytes,
        "parts_ms": {} if policy is None else breakdown(inputs, policy, geometry, settings.repeats),
    }


def breakdown(inputs: list[Inputs], policy: Policy, geometry: Geometry, repeats: int) -> dict[str, float]:
    """Mean ms of a decode step's parts. The append rewrites the newest token."""
    device = inputs[0].q.device
    for warm in (True, False):
        timer = policy.timer = Timer(device, enabled=not warm)
        for number in range(2 if warm else repeats):
            one = inputs[number % len(inputs)]
            runs = newest_runs(one)
            with timer("append"):
                one.cache.append(one.k[:, :, -1], one.v[:, :, -1], runs)
            selection = policy.select(one.q, one.cache, one.batch)
            with timer("attend"):
                _attend(one, selection, geometry)
            timer.steps += 1
    policy.timer = Timer(device)
    ms = timer.ms_per_step
    ms["attend"] += ms.pop("attend_chosen", 0.0)
    return {part: ms.get(part, 0.0) for part in PARTS}


def newest_runs(one: Inputs) -> AppendRuns:
    """The append of each sequence's newest token, in place of itself."""
    newest, size = one.batch.context_lens.long() - 1, one.batch.page_size
    rows = torch.arange(len(newest), dtype=torch.int32, device=newest.device)
    page = one.batch.page_table.gather(1, (newest // size)[:, None])[:, 0]
    return AppendRuns(page, rows, (newest % size).int(), torch.ones_like(rows))


def make_rotation(settings: LayerSettings, geometry: Geometry, kinds: tuple[Metadata, ...]) -> list[Inputs]:
    """The inputs to use in turn: `caches` different caches, or as many sets of queries on a large one.

    If K and V do not fit once more beside the pages, only each sequence's newest token is kept contiguous.

    Raises:
        Unavailable: the caches do not fit.
    """
    page = LayerCache.allocate(0, 1, replace(geometry, device=torch.device("meta")), kinds)
    num_pages = settings.batch * -(-settings.context // settings.page_size) + 1
    kv_bytes = num_pages * (page.k_pages.nbytes + page.v_pages.nbytes)
    count = 1 if kv_bytes >= LARGE_CACHE_BYTES else settings.caches
    held = count * num_pages * sum(tensor.nbytes for tensor in page.pages)
    check_memory(f"a cache of {settings.batch} x {settings.context} tokens", held, geometry.device)
    contiguous = True
    try:
        check_memory("K and V once more", int((held + count * kv_bytes) / CONTIGUOUS_SHARE), geometry.device)
    except Unavailable:
        contiguous = False
    if count < settings.caches:
        return make_query_sets(settings, geometry, kinds, settings.seed, settings.caches, contiguous)
    return [make_inputs(settings, geometry, kinds, settings.seed + number, contiguous) for number in range(count)]


def make_inputs(
    settings: LayerSettings,
    geometry: Geometry,
    kinds: tuple[Metadata, ...],
    seed: int,
    contiguous: bool = True,
    scattered: bool = True,
) -> Inputs:
    """Data as described in `LayerSettings`.

    Args:
        contiguous: keep all of K and V beside the pages; else only each sequence's newest token.
        scattered: place pages all over the cache; else one after the other, as an engine allocates them at first.
    """
    return make_query_sets(settings, geometry, kinds, seed, 1, contiguous, scattered)[0]


def make_query_sets(
    settings: LayerSettings,
    geometry: Geometry,
    kinds: tuple[Metadata, ...],
    seed: int,
    count: int,
    contiguous: bool = True,
    scattered: bool = True,
) -> list[Inputs]:
    """`make_inputs` with `count` sets of queries on one cache, each with its own heavy tokens and random numbers."""
    generator, scatter = (torch.Generator(geometry.device).manual_seed(seed) for _ in range(2))
    n, page_size, heads = settings.context, settings.page_size, settings.num_kv_heads
    pages_each = -(-n // page_size)
    num_pages = settings.batch * pages_each + 1

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=geometry.device).to(geometry.dtype)

    q = random(count, settings.batch, settings.num_heads, settings.head_dim)
    cache = LayerCache.allocate(0, num_pages, geometry, kinds)
    starts = torch.arange(pages_each, dtype=torch.int32, device=geometry.device) * page_size
    counts = (n - starts).clamp_max(page_size)
    table = torch.empty((settings.batch, pages_each), dtype=torch.int32, device=geometry.device)
    order = torch.randperm(num_pages - 1, generator=scatter, device=geometry.device)
    free = (order if scattered else order.sort().values).to(torch.int32) + 1
    kept_shape = (settings.batch, heads, n if contiguous else 1, settings.head_dim)
    kept_k, kept_v = (torch.empty(kept_shape, dtype=geometry.dtype, device=geometry.device) for _ in range(2))
    for row in range(settings.batch):
        k, v = random(heads, n, settings.head_dim), random(heads, n, settings.head_dim)
        k *= settings.key_spread
        for number, head in product(range(count), range(settings.num_heads if settings.heavy_tokens else 0)):
            query = q[number, row, head].float()
            where = torch.randint(n, (settings.heavy_tokens,), generator=generator, device=geometry.device)
            along = query * (settings.heavy_logit / geometry.scale / query.square().sum())
            k[head // geometry.group_size, where] = along.to(geometry.dtype)
        table[row] = free[row * pages_each : (row + 1) * pages_each]
        runs = AppendRuns(table[row], starts, torch.zeros_like(starts), counts)
        cache.append(k.transpose(0, 1), v.transpose(0, 1), runs)
        kept_k[row], kept_v[row] = k[:, -kept_shape[2] :], v[:, -kept_shape[2] :]
    lengths = torch.full((settings.batch,), n, dtype=torch.int32, device=geometry.device)
    num_pages_each = torch.full_like(lengths, pages_each)
    found: list[Inputs] = []
    for number in range(count):
        key = torch.zeros(4, settings.batch, dtype=torch.int64, device=geometry.device)
        key[0], key[3] = torch.arange(settings.batch, device=geometry.device) + number * settings.batch, n - 1
        batch = DecodeBatch(
            page_table=table,
            num_pages=num_pages_each,
            context_lens=lengths,
            last_page_len=lengths - (num_pages_each - 1) * page_size,
            random_key=key,
            max_context_len=n,
            page_size=page_size,
        )
        found.append(Inputs(q[number], kept_k, kept_v, cache, batch))
    return found


def check(one: Inputs, policy: Policy, geometry: Geometry) -> None:
    """Compare a method's output with float64 attention over its selection, and Quest's pages with float64 scores.

    Of a large batch, the first `CHECKED_SEQUENCES` are compared.
    """
    selection = policy.select(one.q, one.cache, one.batch)
    if isinstance(policy, QuestPolicy):
        check_pages(one, policy, selection)
    out = _attend(one, selection, geometry)
    found, expected = [], []
    for row in _checked_rows(one):
        partial = None
        if selection.partial_selection is not None:
            partial = _reference(one, selection.partial_selection, geometry, row, None)
        found.append(row.part(out))
        expected.append(_reference(one, selection, geometry, row, partial)[0])
    check_close(type(policy).__name__, torch.cat(found), torch.cat(expected), MAX_ERROR[geometry.dtype])


def check_pages(one: Inputs, policy: QuestPolicy, selection: Selection) -> None:
    """Check that Quest's pages are the best ones by their float64 scores, up to float32 rounding."""
    batch, config = one.batch, policy.config
    for row in _checked_rows(one):
        whole = {"q": one.q, "page_min_max": one.cache.metadata["page_min_max"], "pages": selection.pages}
        given = row.arguments({**whole, "page_table": batch.page_table, "num_pages": batch.num_pages})
        chosen = given.pop("pages")[0, 0].long()
        scores = page_scores_reference(**given, group_reduction=config.group_reduction)[0, 0]
        scores[: config.sink_pages] = scores[len(scores) - config.recent_pages :] = torch.inf
        k = -(-config.token_budget // batch.page_size)
        if k >= len(scores):
            return
        worst, least = scores[chosen[:k]].min(), scores.topk(k).values[-1]
        if len(chosen[:k].unique()) < k or not worst >= least - 1e-4 * least.abs():
            raise WrongResult("Quest chose other pages than the best by their float64 scores")


def _checked_rows(one: Inputs) -> list[Row]:
    batch, heads = one.q.shape[0], one.cache.k_pages.shape[1]
    return [Row(one.batch, b, h, heads) for b, h in product(range(min(batch, CHECKED_SEQUENCES)), range(heads))]


def _reference(
    one: Inputs, selection: Selection, geometry: Geometry, row: Row, partial: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """float64 attention of one row over what `selection` lists."""
    given = {
        "q": one.q,
        "k_pages": one.cache.k_pages,
        "v_pages": one.cache.v_pages,
        "pages": selection.pages,
        "num_pages": selection.num_pages,
        "last_page_len": one.batch.last_page_len,
        "tokens": selection.tokens,
        "num_tokens": selection.num_tokens,
        "log_weight": selection.log_weight,
    }
    return attend_reference(**row.arguments(given), scale=geometry.scale, partial=partial)


def _methods(settings: LayerSettings) -> dict[str, dict[str, Any]]:
    budget = {"token_budget": settings.token_budget}
    return {
        "dense": {},
        "quest": budget,
        "twilight": {"p": settings.p},
        "vattention": {key: getattr(settings, key) for key in ("epsilon", "delta", "top_k_fraction", "base_fraction")},
        "window": budget,
    }


def mean_tokens(inputs: list[Inputs], selections: list[Selection]) -> tuple[float, float]:
    """Tokens attended by all rows, and tokens read in addition: means over the inputs."""
    attended = [s.attended(one.batch.last_page_len, one.batch.page_size).sum() for one, s in zip(inputs, selections)]
    extra = [s.extra_tokens_read.sum() for s in selections if s.extra_tokens_read is not None]
    return float(sum(attended)) / len(inputs), float(sum(extra)) / len(inputs)


def _attend(one: Inputs, selection: Selection, geometry: Geometry) -> Tensor:
    return attend_selection(one.q, one.cache, one.batch, selection, geometry.scale)


def _sdpa(one: Inputs) -> Tensor:
    return F.scaled_dot_product_attention(one.q.unflatten(1, (one.k.shape[1], -1)), one.k, one.v)


def _decode(one: Inputs, policy: Policy, geometry: Geometry) -> Tensor:
    return _attend(one, policy.select(one.q, one.cache, one.batch), geometry)
