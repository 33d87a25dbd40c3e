"""A run is one complete, typed description: what is wrong in it is said before anything starts, with the remedy."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse.config import EngineConfig, load_run_config, read_yaml
from distributed_sparse.utils.validation import check_keys

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ["llama-3.1-8b-tp1.yaml", "llama-3.1-8b-tp8.yaml", "llama-3.1-70b-tp8.yaml", "qwen3-32b-tp4.yaml"]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_shipped_loads_and_its_method_is_known(name: str) -> None:
    config, params = load_run_config(ROOT / "configs" / name)
    assert f"tp{config.tensor_parallel_size}.yaml" in name
    assert config.resolve_sparse().method == "quest"
    assert params.max_tokens is not None and params.max_tokens >= 512


def test_every_shipped_config_is_tested() -> None:
    engine_configs = {path.name for path in (ROOT / "configs").glob("*.yaml")} - {
        "demo.yaml",
        "smollm2-135m.yaml",
    }  # those run in tests
    assert engine_configs == set(CONFIGS)


def test_only_the_model_must_be_given() -> None:
    config = EngineConfig.from_dict({"model": "m"})
    assert (config.tensor_parallel_size, config.page_size, config.dtype, config.sparse) == (1, 16, "auto", None)
    with pytest.raises(ValueError, match="key 'model' is missing; give a local checkpoint folder or a hub id"):
        EngineConfig.from_dict({})


def test_a_methods_name_alone_is_the_method_with_its_defaults(tmp_path: Path) -> None:
    config = EngineConfig.from_dict({"model": "m", "sparse": "quest"})
    assert config == EngineConfig.from_yaml(write(tmp_path, "model: m\nsparse: quest\n"))
    assert config.resolve_sparse() == EngineConfig(model="m", sparse={"method": "quest"}).resolve_sparse()
    with pytest.raises(ValueError, match=r"sparse.method='qest' is not known; use one of .*'quest'"):
        EngineConfig.from_dict({"model": "m", "sparse": "qest"}).resolve_sparse()


def test_a_config_crosses_to_another_process_unchanged() -> None:
    config = EngineConfig(model="m", sparse={"method": "quest", "token_budget": 64}, step_timeout_s=3)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_path_object_is_taken_for_a_model(tmp_path: Path) -> None:
    config = EngineConfig(model=tmp_path, tokenizer=tmp_path)  # type: ignore[arg-type]
    assert (config.model, config.tokenizer) == (str(tmp_path), str(tmp_path))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, r"model='' must be a non-empty string; give a local checkpoint folder or a hub id"),
    ({"model": 3}, r"model=3 must be a non-empty string"),
    ({"tokenizer": 3}, r"tokenizer=3 must be a non-empty string"),
    ({"tensor_parallel_size": 0}, r"tensor_parallel_size=0 must be >= 1; give the number of ranks"),
    ({"tensor_parallel_size": True}, r"tensor_parallel_size=True must be an integer, not bool"),
    ({"tensor_parallel_size": "2"}, r"tensor_parallel_size='2' must be an integer, not str"),
    ({"tensor_parallel_size": 2.0}, r"tensor_parallel_size=2.0 must be an integer, not float"),
    ({"max_model_len": 1}, r"max_model_len=1 must be >= 2; leave it out"),
    ({"max_num_seqs": 0}, r"max_num_seqs=0 must be >= 1"),
    ({"max_num_batched_tokens": 0}, r"max_num_batched_tokens=0 must be >= 1"),
    (
        {"max_num_seqs": 64, "max_num_batched_tokens": 63},
        r"max_num_batched_tokens=63 is below max_num_seqs=64: .*raise the first or lower the second",
    ),
    ({"gpu_memory_utilization": 0.0}, r"gpu_memory_utilization=0.0 must be finite, > 0 and <= 1; 0.9 is usual"),
    ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization=1.5 must be finite"),
    ({"gpu_memory_utilization": float("nan")}, r"gpu_memory_utilization=nan must be finite"),
    ({"kv_cache_memory_bytes": 0}, r"kv_cache_memory_bytes=0 must be >= 1; give bytes per rank"),
    ({"kv_cache_memory_bytes": 1e9}, r"kv_cache_memory_bytes=1000000000.0 must be an integer, not float"),
    ({"dtype": "fp8"}, r"dtype='fp8' is not known; use one of 'auto', 'float32', 'float16', 'bfloat16'"),
    ({"device": "tpu"}, r"device='tpu' is not known; use one of 'auto', 'cpu', 'cuda'"),
    ({"seed": -1}, r"seed=-1 must be in 0..9223372036854775807"),
    ({"load_format": "pt"}, r"load_format='pt' is not known; use one of 'auto', 'dummy'"),
    ({"use_tqdm_on_load": "no"}, r"use_tqdm_on_load=.no. must be true or false"),
    ({"enforce_eager": 1}, r"enforce_eager=1 must be true or false"),
    ({"trace": "yes"}, r"trace='yes' must be true or false"),
    ({"async_scheduling": "no"}, r"async_scheduling='no' must be true or false"),
    ({"page_size": 17}, r"page_size=17 is not a power of two; use one of 16, 32, 64"),
    ({"page_size": 128}, r"page_size=128 has no kernel; use one of 16, 32, 64"),
    ({"page_size": 0}, r"page_size=0 must be >= 1; use one of 16, 32, 64"),
    (
        {"distributed_executor_backend": "mp"},
        r"distributed_executor_backend='mp' is not known; use one of 'auto', 'ray', 'uni'",
    ),
    (
        {"distributed_executor_backend": "uni", "tensor_parallel_size": 2},
        r"'uni' holds one rank, but tensor_parallel_size=2; use 'ray' or tensor_parallel_size=1",
    ),
    ({"sparse": ["quest"]}, r"sparse=\['quest'\] must be a mapping; write sparse: \{method: quest, ...\}"),
    ({"prefill_store": 3}, r"prefill_store=3 must be a non-empty string; give a folder, or leave it out"),
    ({"startup_timeout_s": 0}, r"startup_timeout_s=0 must be finite, > 0"),
    ({"step_timeout_s": -1}, r"step_timeout_s=-1 must be finite, > 0; .*leave it out"),
    (
        {"max_rebuilds": -1},
        r"max_rebuilds=-1 must be >= 0; give a number of rebuilds, 0 to end the engine at the first failure",
    ),
    ({"profile_interval": 0}, r"profile_interval=0 must be >= 1; give a number of steps, 256 by default"),
    ({"max_rebuilds": 1.5}, r"max_rebuilds=1.5 must be an integer, not float"),
    ({"rebuild_window_s": 0}, r"rebuild_window_s=0 must be finite, > 0; give seconds"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[str(given) for given, _ in WRONG])
def test_a_wrong_value_is_refused_with_key_value_and_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_dict({"model": "m", **given})


def test_a_dtype_may_have_the_names_that_vllm_and_torch_give_it() -> None:
    names: dict[str, list[Any]] = {
        "auto": ["auto"],
        "float32": ["float32", "float", "fp32", "torch.float32", torch.float32],
        "float16": ["float16", "half", "fp16", "torch.half", torch.float16, torch.half],
        "bfloat16": ["bfloat16", "bf16", "BF16", "torch.bfloat16", torch.bfloat16],
    }
    for name, spellings in names.items():
        assert {EngineConfig(model="m", dtype=spelling).dtype for spelling in spellings} == {name}
    for wrong in (torch.int8, torch.float64, None, True, 16, ["half"], "", "torch"):
        with pytest.raises(ValueError, match=r"dtype=.* is not known; use one of 'auto'"):
            EngineConfig(model="m", dtype=wrong)


def test_every_key_has_a_wrong_value_that_is_tested() -> None:
    assert {key for given, _ in WRONG for key in given} == set(EngineConfig.__dataclass_fields__)


def test_an_unknown_key_is_refused_with_the_nearest_valid_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'tensor_paralel_size'; did you mean 'tensor_parallel_size'\?"):
        EngineConfig.from_dict({"model": "m", "tensor_paralel_size": 2})
    path = write(tmp_path, "model: m\nsampeling: {temperature: 0}\n")
    with pytest.raises(ValueError, match=r"run.yaml: unknown key 'sampeling'; did you mean 'sampling'\?"):
        load_run_config(path)
    with pytest.raises(
        ValueError, match=r"run.yaml: sampling: max_token=3: unknown sampling parameter; did you mean 'max_tokens'\?"
    ):
        load_run_config(write(tmp_path, "model: m\nsampling: {max_token: 3}\n"))


def test_an_unknown_key_of_the_method_is_refused_with_the_nearest_valid_one() -> None:
    config = EngineConfig(model="m", sparse={"method": "quest", "token_budgte": 3})
    with pytest.raises(ValueError, match=r"sparse: unknown key 'token_budgte'; did you mean 'token_budget'\?"):
        config.resolve_sparse()


def test_a_key_that_resembles_nothing_is_answered_with_all_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"^here: unknown key 'zzz'; valid keys: alpha, beta$"):
        check_keys({"zzz": 1}, ["alpha", "beta"], "here")
    with pytest.raises(ValueError, match=r"^here: key 3 is not a string"):
        check_keys({3: 1}, ["alpha"], "here")


def test_any_key_of_a_yaml_can_be_overridden_and_the_last_override_wins(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\nsparse: {method: quest, token_budget: 2048}\n")
    overrides = [
        "sparse.token_budget=1", "sparse.token_budget=1024", "sparse.layers=[{range: 2-15, token_budget: 64}]",
        "sampling.temperature=1e-2", "sampling.stop=['=', b]", "model=other=name", "max_model_len=null", "enforce_eager=true",
    ]  # fmt: skip
    config, params = load_run_config(path, overrides)
    assert config.sparse == {"method": "quest", "token_budget": 1024, "layers": [{"range": "2-15", "token_budget": 64}]}
    assert (config.model, config.max_model_len, config.enforce_eager) == ("other=name", None, True)
    assert (params.temperature, params.stop) == (0.01, ["=", "b"])
    assert EngineConfig.from_yaml(path, overrides) == config


@pytest.mark.parametrize("override", ["token_budget", "=3", "sparse.=3", "", "a..b=1"])
def test_an_override_of_the_wrong_form_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match=r"--set .* is not of the form key=value"):
        load_run_config(write(tmp_path, "model: m\n"), [override])


def test_an_override_below_a_plain_value_or_with_broken_yaml_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\n")
    with pytest.raises(ValueError, match=r"--set 'model.name=x': model is 'm', not a section"):
        load_run_config(path, ["model.name=x"])
    with pytest.raises(ValueError, match=r"--set 'sparse=\{a:': is not valid YAML"):
        load_run_config(path, ["sparse={a:"])


def test_numbers_may_be_written_with_an_exponent_alone(tmp_path: Path) -> None:
    # Regression: YAML 1.1 reads 1e-2 as a string.
    given = read_yaml(write(tmp_path, "a: 1e-2\nb: -2.5e+3\nc: 1.0e-2\nd: 1e3x\ne: 12\n"))
    assert given == {"a": 0.01, "b": -2500.0, "c": 0.01, "d": "1e3x", "e": 12}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nmodel: n\n", "key 'model' is given twice"),
        ("model: [\n", "is not valid YAML"),
        ("- a\n", "holds list, not a mapping"),
        ("", "holds NoneType, not a mapping"),
        ("model: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("model: m\nsampling: 3\n", "sampling=3 must be a mapping"),
    ],
)
def test_a_file_that_is_no_run_is_refused_by_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"run.yaml.*{message}") as raised:
        load_run_config(write(tmp_path, text))
    assert "\n\n" not in str(raised.value)


def test_a_file_that_is_absent_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.yaml: cannot be read .*; give the path of a YAML file"):
        load_run_config(tmp_path / "absent.yaml")
