"""config: EngineConfig, the typed and validated settings of an engine, and the YAML that it is read from. Imports no torch."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.validation import (
    check_bool,
    check_choice,
    check_dtype,
    check_float,
    check_int,
    check_keys,
    check_string,
    shown,
)
from distributed_sparse.utils.vllm_names import ENGINE, drop_neutral

if TYPE_CHECKING:
    from distributed_sparse.selection import SparseConfig

PAGE_SIZES = (16, 32, 64)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All settings of an engine. The constructor validates them, except `sparse`, which `resolve_sparse` validates.

    Attributes:
        model: local checkpoint folder or Hugging Face hub id.
        tokenizer: local folder or hub id of the tokenizer; None: the model's, if it has one.
        tensor_parallel_size: number of ranks; each holds a part of the heads.
        max_model_len: maximum tokens of prompt plus output; None: the checkpoint's limit.
        max_num_seqs: maximum number of sequences that run at once.
        max_num_batched_tokens: maximum tokens of one step, decode rows plus prompt chunks.
        gpu_memory_utilization: fraction of a GPU's memory for weights, cache and buffers, in (0, 1].
        kv_cache_memory_bytes: bytes of KV pages and their metadata per rank; None: profiled on a GPU, a fixed default on CPU.
        dtype: "auto" (the checkpoint's), "float32", "float16" or "bfloat16"; torch.float32, "half", "bf16", ... as in vLLM.
        device: "auto", "cpu" or "cuda".
        seed: the engine's seed; requests without a seed derive theirs from it.
        load_format: "auto" (safetensors) or "dummy" (random weights).
        use_tqdm_on_load: show rank 0's progress in reading weights on standard error, if reading takes more than a moment.
        enforce_eager: run without CUDA graphs.
        async_scheduling: schedule and send a step before the previous result arrives, so that ranks do not idle between steps.
        page_size: tokens per KV page: 16, 32 or 64.
        prefill_store: folder on every rank's node that stores K, V and final hidden states of each prompt chunk. A later engine
            with the same weights, and any method and page size, reads a stored chunk instead of computing it; tokens and
            log-probabilities are bit-identical. None: nothing is stored. See `shard/prefill_store.py`.
        distributed_executor_backend: "auto", "ray" or "uni" (one rank in this process).
        sparse: mapping with the selection method's name in `method` and the method's keys, or the name alone for the default
            keys; None: dense attention.
        trace: compare decode attention with dense attention over the same cache and record the difference in
            `CompletionOutput.trace`. `SamplingParams.trace_steps` selects the steps. For analysis only: a traced step reads the
            whole cache.
        startup_timeout_s: seconds within which every rank must be ready.
        step_timeout_s: seconds within which the ranks must answer a step; None: max(5 s, 20 x the p99 of steps of that kind).
        profile_interval: measure the parts of every N-th decode step (`stats()["time_ms"]`). A measured step
            synchronizes with the device more often and runs without a CUDA graph. None: only steps that a request asks for.
        max_rebuilds: how many times failed shards are replaced within `rebuild_window_s`; one more failure ends the engine.
        rebuild_window_s: seconds after which a failure no longer counts towards `max_rebuilds`.

    Raises:
        ValueError: a setting is invalid; the message names the key, its value and the remedy.
    """

    model: str
    tokenizer: str | None = None
    tensor_parallel_size: int = 1
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    load_format: str = "auto"
    use_tqdm_on_load: bool = True
    enforce_eager: bool = False
    async_scheduling: bool = True
    page_size: int = 16
    prefill_store: str | None = None
    distributed_executor_backend: str = "auto"
    sparse: dict[str, Any] | None = None
    trace: bool = False
    startup_timeout_s: float = 600.0
    step_timeout_s: float | None = None
    profile_interval: int | None = 256
    max_rebuilds: int = 5
    rebuild_window_s: float = 600.0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def put_int(name: str, low: int, remedy: str, high: int | None = None) -> None:
            put(name, check_int(name, getattr(self, name), low, high, remedy=remedy))

        for name in ("model", "tokenizer", "prefill_store"):
            if isinstance(getattr(self, name), os.PathLike):
                put(name, os.fspath(getattr(self, name)))
        check_string("model", self.model, "give a local checkpoint folder or a hub id")
        if self.tokenizer is not None:
            check_string("tokenizer", self.tokenizer, "give a folder or a hub id, or leave it out to take the model's")
        if self.prefill_store is not None:
            check_string("prefill_store", self.prefill_store, "give a folder, or leave it out to store nothing")
            put("prefill_store", os.path.abspath(os.path.expanduser(self.prefill_store)))

        put_int("tensor_parallel_size", 1, "give the number of ranks, 1 for no sharding")
        if self.max_model_len is not None:
            put_int("max_model_len", 2, "leave it out to take the checkpoint's limit")
        put_int("max_num_seqs", 1, "give the maximum number of sequences that run at once")
        put_int("max_num_batched_tokens", 1, "give the maximum number of tokens of one step")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs={self.max_num_seqs}: a step "
                "cannot hold one token of each running sequence; raise the first or lower the second"
            )
        utilization = check_float(
            "gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0, low_excluded=True, remedy="0.9 is usual"
        )
        put("gpu_memory_utilization", utilization)
        if self.kv_cache_memory_bytes is not None:
            put_int("kv_cache_memory_bytes", 1, "give bytes per rank (4 GiB is 4294967296), or leave it out")

        put("dtype", check_dtype("dtype", self.dtype))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        put_int("seed", 0, "give an unsigned 63-bit number", (1 << 63) - 1)
        check_choice("load_format", self.load_format, ("auto", "dummy"))
        check_bool("use_tqdm_on_load", self.use_tqdm_on_load)
        check_bool("enforce_eager", self.enforce_eager)
        check_bool("async_scheduling", self.async_scheduling)
        put_int("page_size", 1, f"use one of {', '.join(map(str, PAGE_SIZES))}")
        if self.page_size not in PAGE_SIZES:
            reason = "is not a power of two" if self.page_size & (self.page_size - 1) else "has no kernel"
            raise ValueError(f"page_size={self.page_size} {reason}; use one of {', '.join(map(str, PAGE_SIZES))}")
        check_choice("distributed_executor_backend", self.distributed_executor_backend, ("auto", "ray", "uni"))
        if self.distributed_executor_backend == "uni" and self.tensor_parallel_size > 1:
            raise ValueError(
                f"distributed_executor_backend='uni' holds one rank, but tensor_parallel_size={self.tensor_parallel_size}; "
                "use 'ray' or tensor_parallel_size=1"
            )
        if isinstance(self.sparse, str):
            put("sparse", {"method": self.sparse})
        elif self.sparse is not None:
            if not isinstance(self.sparse, Mapping):
                raise ValueError(f"sparse={shown(self.sparse)} must be a mapping; write sparse: {{method: quest, ...}}")
            put("sparse", dict(self.sparse))
        check_bool("trace", self.trace)

        remedy = "give seconds"
        put(
            "startup_timeout_s", check_float("startup_timeout_s", self.startup_timeout_s, 0.0, low_excluded=True, remedy=remedy)
        )
        if self.step_timeout_s is not None:
            remedy = "give seconds, or leave it out to derive it from the measured step times"
            put("step_timeout_s", check_float("step_timeout_s", self.step_timeout_s, 0.0, low_excluded=True, remedy=remedy))
        if self.profile_interval is not None:
            put_int("profile_interval", 1, "give a number of steps, 256 by default")
        put_int("max_rebuilds", 0, "give a number of rebuilds, 0 to end the engine at the first failure")
        put(
            "rebuild_window_s",
            check_float("rebuild_window_s", self.rebuild_window_s, 0.0, low_excluded=True, remedy="give seconds"),
        )

    @property
    def uses_ray(self) -> bool:
        """Whether the ranks are Ray actors."""
        backend = self.distributed_executor_backend
        return backend == "ray" or (backend == "auto" and self.tensor_parallel_size > 1)

    def resolve_sparse(self) -> "SparseConfig":
        """Return the typed config of the method in `sparse`. Raises ValueError for an invalid key or value.

        Imports `selection` lazily: methods may import torch, and this module must not.
        """
        from distributed_sparse.selection import resolve_sparse_config

        sparse = resolve_sparse_config(self.sparse)
        if self.trace and sparse.evict_window(self.page_size) is not None:
            raise ValueError(
                "trace=True needs every page to compare with dense attention, but sparse.evict=true frees pages; "
                "remove one of the two"
            )
        return sparse

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str = "engine configuration") -> "EngineConfig":
        """Make an EngineConfig from the keys of `given`; error messages begin with `where`.

        Unsupported arguments of vLLM are accepted at values that change nothing. None selects the default of a key that does
        not accept None itself (`max_num_seqs=None`).

        Raises:
            ValueError: a key is unknown (the message gives the nearest valid one), `model` is missing, or a value is invalid.
        """
        own = drop_neutral(given, ENGINE, {"page_size": cls.page_size, **given}, f"{where}: ")
        check_keys(own, [f.name for f in fields(cls)], where)
        if "model" not in own:
            raise ValueError(f"{where}: key 'model' is missing; give a local checkpoint folder or a hub id")
        takes_none = [f.name for f in fields(cls) if f.name == "model" or type(None) in get_args(f.type)]
        return cls(**{name: value for name, value in own.items() if value is not None or name in takes_none})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> "EngineConfig":
        """Read the EngineConfig of a run's YAML. Its `sampling` section is only validated; see `load_run_config`."""
        return load_run_config(path, overrides)[0]


def load_run_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> tuple[EngineConfig, SamplingParams]:
    """Read a run's YAML, which holds the keys of EngineConfig and a section `sampling` with the keys of SamplingParams.

    Args:
        path: the YAML file.
        overrides: "key=value" strings; the last one for a key wins. Dots separate nested keys ("sparse.token_budget=1024");
            values are YAML.

    Raises:
        ValueError: the file cannot be read, a key is unknown (the message gives the nearest valid one), or a value is invalid.
    """
    run = read_yaml(path)
    for override in overrides:
        set_override(run, override)
    sampling = run.pop("sampling", None)
    if sampling is None:
        sampling = {}
    if not isinstance(sampling, dict):
        raise ValueError(f"{path}: sampling={shown(sampling)} must be a mapping; write sampling: {{temperature: 0, ...}}")
    check_keys([key for key in run if key not in ENGINE], [*(f.name for f in fields(EngineConfig)), "sampling"], str(path))
    try:
        params = SamplingParams.from_dict(sampling)
    except ValueError as error:
        raise ValueError(f"{path}: sampling: {error}") from None
    return EngineConfig.from_dict(run, str(path)), params


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: the file cannot be read, is not valid YAML, has a duplicate key, or does not hold a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: cannot be read ({error}); give the path of a YAML file") from None
    given = _parse_yaml(text, os.fspath(path))
    if not isinstance(given, dict):
        raise ValueError(f"{os.fspath(path)}: holds {type(given).__name__}, not a mapping; write `key: value` lines")
    return given


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that it reads 1e-2 as a float (YAML 1.1 requires 1.0e-2) and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # safe: a subclass of SafeLoader, which builds plain values only
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: is not valid YAML: {error}") from None


def set_override(run: dict[str, Any], override: str) -> None:
    """Apply one override "a.b=value" to the nested mapping `run` in place. Creates missing sections; the value is YAML.

    Raises:
        ValueError: `override` does not have that form, or a key before the last holds a value that is not a section.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ValueError(f"--set {override!r} is not of the form key=value; write for instance sparse.token_budget=1024")
    section = run
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
        if not isinstance(section[key], dict):
            raise ValueError(f"--set {override!r}: {'.'.join(keys[: depth + 1])} is {shown(section[key])}, not a section")
        section = section[key]
    section[keys[-1]] = _parse_yaml(text, f"--set {override!r}")
