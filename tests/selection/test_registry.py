"""A method is named, set and overridden per layer, from inside or outside the engine; what is wrong is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse import SamplingParams
from distributed_sparse.cache import Geometry, PageMinMax
from distributed_sparse.selection import POLICIES, build_policies, layer_configs, resolve_sparse_config
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.outside_policy import EveryOtherConfig
from tests.support.prompts import random_tokens

OUTSIDE = "tests.support.outside_policy:EveryOtherPolicy"
GEOMETRY = Geometry(
    num_kv_heads=4, group_size=2, head_dim=64, page_size=16, dtype=torch.float32, device=torch.device("cpu"), first_kv_head=0
)

REQUIRED = {"hash": {"hash_weights": "weights.safetensors"}}
"""Settings without which a method is refused."""

# ---- names and values


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"method": "qest"}, "sparse.method='qest' is not known; use one of 'dense', 'quest', 'sketch', 'twilight'"),
        ({"method": "oracle"}, "sparse.method='oracle' is not known; .*'random', 'oracle_topk'"),
        ({"method": "Quest"}, "sparse.method='Quest' is not known"),
        ({"method": 3}, "sparse.method=3 is not known"),
        ({"token_budget": 64}, "sparse has no method; use one of dense, quest, sketch, twilight, vattention, hash, window"),
        ({"method": "quest", "token_buget": 64}, "sparse: unknown key 'token_buget'; did you mean 'token_budget'"),
        ({"method": "quest", "sink": 1}, "sparse: unknown key 'sink'"),
        ({"method": "window", "group_reduction": "max"}, "sparse: unknown key 'group_reduction'"),
        ({"method": "dense", "token_budget": 64}, "sparse: unknown key 'token_budget'"),
        ({"method": "quest", "token_budget": "many"}, "sparse: .*int.*token_budget"),
        ({"method": "quest", "token_budget": 64.5}, "sparse: .*int.*token_budget"),
        ({"method": "quest", "group_reduction": "mean"}, "sparse.group_reduction='mean' is not known; use one of 'max', 'sum'"),
        ({"method": "quest", "recent_pages": 0}, "sparse.recent_pages=0 is below 1: the page being written"),
        ({"method": "quest", "sink_pages": -1}, "sparse.sink_pages=-1 is below 0"),
        ({"method": "quest", "min_context": -5}, "sparse.min_context=-5 is below 0"),
        ({"method": "quest", "dense_layers": -1}, "sparse.dense_layers=-1 is below 0"),
        ({"method": "quest", "layers": [{"range": "2-1", "token_budget": 64}]}, "sparse.layers range '2-1' is not understood"),
        ({"method": "quest", "layers": [{"range": "a-b"}]}, "sparse.layers range 'a-b' is not understood; write '2-15'"),
        ({"method": "quest", "layers": [{"token_budget": 64}]}, "sparse.layers range '' is not understood"),
        (
            {"method": "quest", "layers": [{"range": "2-3", "token_buget": 1}]},
            "sparse.layers: unknown key 'token_buget'; did you",
        ),
        ({"method": "quest", "layers": [{"range": "2", "token_budget": "x"}]}, "sparse.layers: .*int.*token_budget"),
        ({"method": "nowhere.at.all:Policy"}, "sparse.method='nowhere.at.all:Policy' is not importable .*PYTHONPATH"),
        ({"method": "tests.support.outside_policy:Missing"}, "outside_policy:Missing' is not importable .*Missing"),
        ({"method": "tests.support.outside_policy:NotAPolicy"}, "NotAPolicy' is not a subclass of .*base.Policy"),
        ({"method": OUTSIDE, "strid": 3}, "sparse: unknown key 'strid'; did you mean 'stride'"),
    ],
)
def test_wrong_settings_are_refused_by_name(sparse: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_sparse_config(sparse)


@pytest.mark.parametrize(
    ("settings", "page_size", "message"),
    [
        ({"token_budget": 31}, 32, "sparse.token_budget=31 is below the 3 forced pages of 32 tokens .* set it to 96 or more"),
        ({"token_budget": 16}, 16, "sparse.token_budget=16 is below the 3 forced pages"),
        ({"token_budget": 64, "sink_pages": 2, "recent_pages": 3}, 16, "below the 5 forced pages .* set it to 80 or more"),
        ({"layers": [{"range": "3", "token_budget": 16}]}, 16, "sparse.token_budget=16 is below the 3 forced pages"),
        ({"layers": [{"range": "3-4", "token_budget": 64}]}, 16, "range '3-4' goes beyond the model's last layer, 3"),
    ],
)
@pytest.mark.parametrize("method", ["quest", "window", "random", "oracle_topk", "hash"])
def test_settings_that_do_not_hold_for_the_model_are_refused(
    method: str, settings: dict[str, Any], page_size: int, message: str
) -> None:
    config = resolve_sparse_config({"method": method, **REQUIRED.get(method, {}), **settings})
    with pytest.raises(ValueError, match=message):
        layer_configs(config, 4, page_size)


def test_a_budget_of_just_the_forced_pages_is_accepted() -> None:
    assert len(layer_configs(QuestConfig(token_budget=33), 4, 16)) == 4  # 33 tokens are three pages


def test_no_section_is_dense() -> None:
    assert resolve_sparse_config(None) == DenseConfig()


def test_an_engine_refuses_wrong_settings_before_it_loads_anything(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    (path / "model.safetensors").write_bytes(b"")
    for sparse, message in [
        ({"method": "quest", "token_buget": 64}, "did you mean 'token_budget'"),
        ({"method": "quest", "token_budget": 16}, "below the 3 forced pages"),
        ({"method": "quest", "layers": [{"range": "0-3"}]}, "beyond the model's last layer, 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_llm(path, sparse=sparse)


# ---- settings per layer


def test_overrides_hold_for_their_layers_and_leave_the_rest() -> None:
    sparse = {
        "method": "quest",
        "token_budget": 512,
        "dense_layers": 1,
        "sink_pages": 2,
        "layers": [{"range": "0-2", "token_budget": 1024}, {"range": "4", "group_reduction": "sum"}],
    }
    configs = layer_configs(resolve_sparse_config(sparse), 6, 16)
    common: dict[str, Any] = {"dense_layers": 1, "sink_pages": 2}
    assert configs == [
        DenseConfig(),
        QuestConfig(token_budget=1024, **common),
        QuestConfig(token_budget=1024, **common),
        QuestConfig(token_budget=512, **common, layers=configs[3].layers),
        QuestConfig(token_budget=512, group_reduction="sum", **common),
        configs[3],
    ]


def test_overrides_of_the_same_layer_add_up_and_the_later_one_wins() -> None:
    layers = [{"range": "0-3", "token_budget": 64, "sink_pages": 2}, {"range": "2", "token_budget": 96}]
    configs = layer_configs(resolve_sparse_config({"method": "quest", "dense_layers": 0, "layers": layers}), 4, 16)
    assert [(own.token_budget, own.sink_pages) for own in configs if isinstance(own, QuestConfig)] == [
        (64, 2),
        (64, 2),
        (96, 2),
        (64, 2),
    ]


def test_an_override_may_make_a_layer_dense_or_free_it() -> None:
    layers = [{"range": "3", "dense_layers": 4}, {"range": "0", "dense_layers": 0}]
    configs = layer_configs(resolve_sparse_config({"method": "quest", "layers": layers}), 5, 16)
    assert [isinstance(own, DenseConfig) for own in configs] == [False, True, False, True, False]


def test_layers_of_equal_settings_share_a_policy_and_only_sparse_ones_keep_metadata() -> None:
    config = resolve_sparse_config({"method": "quest", "layers": [{"range": "3", "token_budget": 64}]})
    policies = build_policies("quest", config, 6, GEOMETRY)
    assert [type(policy) for policy in policies] == [DensePolicy] * 2 + [QuestPolicy] * 4
    assert policies[0] is policies[1] and policies[2] is policies[4] is policies[5] and policies[3] is not policies[2]
    assert [policy.metadata for policy in policies] == [()] * 2 + [(PageMinMax(),)] * 4


def test_every_registered_method_is_named_as_its_config_says() -> None:
    methods = {"dense", "quest", "sketch", "twilight", "vattention", "hash", "window", "tova", "random", "oracle_topk"}
    assert set(POLICIES) == methods
    for name, policy in POLICIES.items():
        config = resolve_sparse_config({"method": name, **REQUIRED.get(name, {})})
        assert type(config) is policy.config_class and config.method == name


# ---- a method from outside


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


def test_a_method_from_outside_gets_its_settings_and_decides_what_is_read(path: Path) -> None:
    sparse = {"method": OUTSIDE, "stride": 3, "dense_layers": 1}
    assert resolve_sparse_config(sparse) == EveryOtherConfig(stride=3, dense_layers=1)
    with make_llm(path, sparse=sparse) as llm:
        llm.score(random_tokens(150), decode_last_prompt_tokens=1)
        attention = llm.stats()["attention"]
        tokens = llm.generate([random_tokens(100)], SamplingParams(temperature=0.0), use_tqdm=False)[0].outputs[0].token_ids
    # Context 150: of pages 0 to 9 (the last of 6 tokens) 0, 3, 6 and 9 are read.
    assert attention["density"] == [[1.0] * 4] + [[(3 * 16 + 6) / 150] * 4] * 2
    assert len(tokens) == 16


def test_a_method_from_outside_that_reads_every_page_is_dense(path: Path) -> None:
    prompts = [random_tokens(length, seed=length) for length in (60, 90)]
    answers = []
    for sparse in (None, {"method": OUTSIDE, "stride": 1, "dense_layers": 0}):
        with make_llm(path, sparse=sparse) as llm:
            params = SamplingParams(temperature=1.0, seed=1, max_tokens=40)
            answers.append([output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)])
            assert llm.stats()["attention"]["rows_sparse"] == 0
    assert answers[0] == answers[1]


def test_a_method_may_live_in_any_module_on_the_path(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_newest_page.py").write_text(
        """
from dataclasses import dataclass
from typing import ClassVar
from distributed_sparse.selection.base import Policy, Selection, SparseConfig
from distributed_sparse.cache import PageMinMax

@dataclass(frozen=True, kw_only=True)
class NewestConfig(SparseConfig):
    method: ClassVar[str] = "newest"

class NewestPolicy(Policy):
    config_class = NewestConfig
    metadata = (PageMinMax(),)

    def select(self, q, cache, batch):
        assert cache.metadata["page_min_max"] is not None
        last = (batch.num_pages - 1).long()[:, None]
        pages = batch.page_table.gather(1, last)[:, None].expand(-1, self.geometry.num_kv_heads, -1)
        return Selection(pages, pages.new_ones(pages.shape[:2]))
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with make_llm(path, sparse={"method": "my_newest_page:NewestPolicy", "dense_layers": 0}) as llm:
        llm.score(random_tokens(75), decode_last_prompt_tokens=3)
        stats = llm.stats()
    assert stats["attention"]["density"] == [[(9 + 10 + 11) / (73 + 74 + 75)] * 4] * 3
    assert stats["ranks"][0]["metadata_bytes"] > 0


def test_an_override_of_layers_that_are_dense_anyway_is_refused_and_not_ignored() -> None:
    config = resolve_sparse_config({"method": "quest", "layers": [{"range": "0-1", "token_budget": 64}]})
    with pytest.raises(ValueError, match=r"'0-1' lies below dense_layers=2: it would change nothing; set dense_layers: 0"):
        layer_configs(config, 4, 16)
    for layers in ([{"range": "0-1", "token_budget": 64, "dense_layers": 0}], [{"range": "1-2", "token_budget": 64}]):
        layer_configs(resolve_sparse_config({"method": "quest", "layers": layers}), 4, 16)
    dense = layer_configs(resolve_sparse_config({"method": "quest", "layers": [{"range": "3", "dense_layers": 9}]}), 4, 16)
    assert [type(own).__name__ for own in dense] == ["DenseConfig", "DenseConfig", "QuestConfig", "DenseConfig"]
