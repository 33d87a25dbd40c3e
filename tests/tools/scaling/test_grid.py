"""A scaling YAML becomes complete points; what is misspelt is refused before an hour of measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed_sparse.tools.scaling.grid import ScalingConfig
from distributed_sparse.tools.scaling.run_grid import Scaling

ROOT = Path(__file__).resolve().parents[3]
BASE: dict[str, Any] = {"model": "some/model", "page_size": 16}
LOAD: dict[str, Any] = {"input_len": 64, "output_len": 8}


def points(**sections: Any) -> list[Any]:
    return ScalingConfig.from_dict({"base": BASE, "workload": LOAD, **sections}, "a.yaml").points


def test_the_grid_is_the_product_of_its_axes_each_point_with_complete_settings() -> None:
    found = points(grid={"context": [64, 128], "batch": [1, 4], "dtype": ["float32", "bfloat16"]})
    assert len(found) == 8 and len({point.key for point in found}) == 8
    last = found[-1]
    assert (last.workload.input_len, last.workload.batch, last.engine.dtype) == (128, 4, "bfloat16")
    assert last.axes == {"context": "128", "batch": "4", "dtype": "bfloat16"}


def test_what_is_left_open_follows_from_the_workload() -> None:
    (point,) = points(grid={"batch": [4]})
    assert point.engine.max_num_seqs == 4 and point.engine.max_model_len == 72
    assert point.workload.num_prompts == 8 and point.workload.warm_up == 4
    assert point.engine.profile_interval is None


def test_an_axis_of_a_method_varies_only_the_methods_that_have_it() -> None:
    found = points(grid={"sparse": ["dense", {"method": "quest"}], "token_budget": [32, 48]})
    assert [point.engine.sparse for point in found] == [
        {"method": "dense"},
        {"method": "quest", "token_budget": 32},
        {"method": "quest", "token_budget": 48},
    ]


def test_dotted_axes_reach_the_workload_and_the_method() -> None:
    found = points(base=BASE | {"sparse": {"method": "twilight"}}, grid={"sparse.p": [0.5, 0.9], "workload.output_len": [1, 2]})
    assert [(point.engine.sparse["p"], point.workload.output_len) for point in found] == [
        (0.5, 1),
        (0.5, 2),
        (0.9, 1),
        (0.9, 2),
    ]


def test_exclude_takes_points_out_by_values_by_lists_of_values_and_by_a_method_s_name() -> None:
    grid = {
        "context": [64, 128],
        "batch": [1, 2, 4],
        "sparse": ["dense", {"method": "quest", "token_budget": 32, "recent_pages": 1}],
    }
    found = points(grid=grid, exclude=[{"context": 128, "batch": [2, 4]}, {"sparse": "quest", "batch": 4}])
    assert [point.label.replace("context=", "") for point in found] == [
        "64, batch=1, sparse=dense",
        "64, batch=1, sparse=quest 32",
        "64, batch=2, sparse=dense",
        "64, batch=2, sparse=quest 32",
        "64, batch=4, sparse=dense",
        "128, batch=1, sparse=dense",
        "128, batch=1, sparse=quest 32",
    ]


def test_points_that_differ_in_their_placement_alone_are_one_group() -> None:
    found = points(grid={"batch": [1, 2], "tensor_parallel_size": [1, 2], "nodes": [1, 2]})
    assert len({point.key for point in found}) == 8
    assert len({point.group for point in found}) == 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gird": {}}, "unknown key 'gird'; did you mean 'grid'"),
        ({"base": BASE | {"dytpe": "float32"}}, "base: unknown key 'dytpe'; did you mean 'dtype'"),
        ({"workload": LOAD | {"outptu_len": 3}}, "workload: unknown key 'outptu_len'; did you mean 'output_len'"),
        ({"grid": {"contxt": [1]}}, "grid: unknown key 'contxt'; did you mean 'context'"),
        ({"grid": {"workload.bach": [1]}}, "unknown key 'workload.bach'; did you mean 'workload.batch'"),
        ({"grid": {"sparse.p": [0.9]}}, "unknown key 'sparse.p'"),
        ({"checks": {"tolkens": True}}, "checks: unknown key 'tolkens'; did you mean 'tokens'"),
        ({"checks": {"agreement": 2}}, "checks.agreement=2 must be finite"),
        ({"checks": {"leaks": "yes"}}, "checks.leaks='yes' must be true or false"),
        ({"grid": {"batch": 4}}, "grid.batch=4 must be a list"),
        ({"grid": {"batch": [0]}}, "workload.batch=0 must be in 1.*at batch=0"),
        ({"grid": {"sparse": [{"method": "quest", "budget": 1}]}}, "sparse: unknown key 'budget'.*at sparse="),
        ({"grid": {"sparse": ["qest"]}}, "sparse.method='qest' is not known"),
        ({"grid": {"batch": [1]}, "exclude": [{"context": 1}]}, "exclude: unknown key 'context'"),
        ({"grid": {"batch": [1]}, "exclude": [{"batch": 1}]}, "exclude leaves no point"),
        ({"base": BASE | {"max_num_seqs": 2}, "grid": {"batch": [4]}}, "max_num_seqs=2 is below batch=4"),
        ({"workload": {"output_len": 3}}, "key 'input_len' is missing"),
        ({"workload": LOAD | {"sampling": {"n": 2}}}, "workload.sampling: unknown key 'n'"),
        ({"workload": LOAD | {"sampling": {"temperature": -1}}}, "temperature=-1"),
    ],
)
def test_what_is_misspelt_or_out_of_range_is_refused_with_its_place(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points(**sections)


@pytest.mark.parametrize("name", ["cpu", "one-gpu", "8-gpu", "multi-node"])
def test_every_configuration_of_the_repository_holds_for_its_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert len(Scaling(ScalingConfig.from_yaml(f"configs/scaling/{name}.yaml")).points) > 1
