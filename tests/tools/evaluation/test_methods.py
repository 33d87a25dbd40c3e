"""What --methods, --budgets and --sweep mean, and which controls belong to a run."""

from __future__ import annotations

from typing import Any

import pytest

from distributed_sparse.tools.evaluation.methods import controls_of, label, parse_methods, selecting_layers, settings_key


def test_every_budget_is_a_run_of_a_method_that_has_one() -> None:
    runs = parse_methods(["quest,twilight", "window"], [64, 128])
    assert [label(run) for run in runs] == ["quest 64", "quest 128", "twilight", "window 64", "window 128"]


def test_objects_keep_their_own_settings() -> None:
    texts = ["{method: quest, token_budget: 96}", "[{method: vattention, epsilon: 0.05}, twilight]"]
    runs = parse_methods(texts, [64])
    assert [label(run) for run in runs] == ["quest 96", "vattention epsilon=0.05", "twilight"]


def test_sweeps_are_combined() -> None:
    runs = parse_methods(["vattention,quest"], [64], ["vattention.epsilon=0.05,0.1", "vattention.delta=0.1,0.2"])
    found = [(run["epsilon"], run["delta"]) for run in runs if run["method"] == "vattention"]
    assert found == [(0.05, 0.1), (0.05, 0.2), (0.1, 0.1), (0.1, 0.2)] and len(runs) == 5


def test_a_run_is_there_once() -> None:
    assert len(parse_methods(["quest", "quest", "{token_budget: 64, method: quest}"], [64, 64])) == 1
    assert settings_key({"method": "quest", "p": 1}) == settings_key({"p": 1, "method": "quest"})
    assert settings_key({"method": "quest", "p": 1}) != settings_key({"method": "quest", "p": 2})


def test_the_configuration_gives_common_keys_to_all_and_the_rest_to_its_own_method() -> None:
    base = {"method": "twilight", "p": 0.9, "dense_layers": 1, "layers": [{"range": "2", "p": 0.8}]}
    twilight, quest = parse_methods(["twilight,quest"], [64], base=base)
    assert twilight == base
    assert quest == {"method": "quest", "dense_layers": 1, "token_budget": 64}


@pytest.mark.parametrize(
    ("texts", "sweeps", "message"),
    [
        (["qest"], [], "sparse.method='qest' is not known"),
        (["{method: quest, budget: 1}"], [], "unknown key 'budget'"),
        (["{p: 1}"], [], "is no name and no object with a method"),
        (["{method: quest"], [], "is not YAML"),
        (["quest"], ["twilight.p=0.9"], "--methods has no 'twilight'; add it"),
        (["twilight"], ["p=0.9"], "is not of the form method.key=value"),
        (["twilight"], ["twilight.p=1.5"], "sparse.p=1.5"),
    ],
)
def test_wrong_methods_are_refused(texts: list[str], sweeps: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_methods(texts, [64], sweeps)


@pytest.mark.parametrize(("attended", "budget"), [(58.2, 64), (64.0, 64), (64.1, 80), (3.0, 48)])
def test_controls_have_the_attended_tokens_in_whole_pages_and_no_less_than_the_forced_ones(
    attended: float, budget: int
) -> None:
    settings: dict[str, Any] = {"method": "quest", "token_budget": 64, "recent_pages": 2}
    controls = controls_of(settings, attended, page_size=16)
    assert [control["method"] for control in controls] == ["window", "random", "oracle_topk"]
    assert all(control["token_budget"] == budget and control["recent_pages"] == 2 for control in controls)


def test_an_adaptive_method_is_compared_with_quest_and_a_control_not_with_itself() -> None:
    assert [c["method"] for c in controls_of({"method": "twilight"}, 50, 16)] == ["quest", "window", "random", "oracle_topk"]
    window = {"method": "window", "token_budget": 64}
    assert [c["method"] for c in controls_of(window, 64, 16)] == ["random", "oracle_topk"]


def test_only_layers_that_select_count() -> None:
    assert selecting_layers({"method": "quest"}, 4, 16) == [2, 3]
    layers = [{"range": "0", "dense_layers": 0}]
    assert selecting_layers({"method": "quest", "layers": layers}, 4, 16) == [0, 2, 3]
    assert selecting_layers({"method": "dense"}, 2, 16) == [0, 1]
