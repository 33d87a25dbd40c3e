"""An engine made inside an actor or a task of a placement group uses that group's bundles, and leaves the group as it was."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.ray_backend.test_group import assert_gone, placement_groups
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

Scheduling = Callable[..., Any]


class User:
    """Code of a user who decodes inside of an actor."""

    def open(self, model: str, **settings: Any) -> tuple[list[int], dict[str, float]]:
        """Pids of the ranks, and what the group has unused while the engine runs."""
        import ray

        from distributed_sparse import LLM

        self.llm = LLM(model, tensor_parallel_size=2, device="auto", max_model_len=64, max_num_seqs=2, **settings)
        group = ray.util.get_current_placement_group().id.hex()
        bundles = {f"CPU_group_{i}_{group}": f"bundle {i}" for i in range(8)}
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:  # Ray's figures come late
            unused = {bundles[k]: v for k, v in ray.available_resources().items() if k in bundles}
            if not unused:
                break
            time.sleep(0.1)
        return [rank["pid"] for rank in self.llm.stats()["ranks"]], unused

    def generate(self) -> list[int]:
        from distributed_sparse import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        (output,) = self.llm.generate([{"prompt_token_ids": [1, 5, 9]}], params, use_tqdm=False)
        assert output.error is None, output.error
        return output.outputs[0].token_ids

    def close(self) -> None:
        self.llm.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def group_of() -> Iterator[Scheduling]:
    """A placement group of bundles with so many CPUs; options of an actor or task in its bundle 0."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    groups = []

    def make(*cpus: float) -> PlacementGroupSchedulingStrategy:
        groups.append(ray.util.placement_group([{"CPU": count} for count in cpus]))
        assert groups[-1].wait(WAIT_S), "the tests' Ray has too few CPUs, or another test has left some in use"
        return PlacementGroupSchedulingStrategy(groups[-1], placement_group_bundle_index=0)

    before = placement_groups()
    yield make
    for group in groups:
        ray.util.remove_placement_group(group)
    deadline = time.monotonic() + WAIT_S
    while placement_groups() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert placement_groups() == before


@pytest.mark.slow
def test_ranks_live_in_the_bundles_that_the_client_leaves_and_the_group_stays(group_of: Scheduling, model: str) -> None:
    import ray

    groups = placement_groups()
    strategy = group_of(1, 2)  # two ranks in one bundle
    user = ray.remote(num_cpus=1)(User).options(scheduling_strategy=strategy).remote()
    pids, unused = ray.get(user.open.remote(model), timeout=WAIT_S)
    assert unused == {}, "each bundle is in use: by the client, and by the ranks"
    assert len(placement_groups() - groups) == 1, "no second placement group was made"
    tokens = ray.get(user.generate.remote(), timeout=WAIT_S)
    os.kill(pids[1], signal.SIGKILL)
    assert ray.get(user.generate.remote(), timeout=WAIT_S) == tokens  # a rank that has died is replaced in its bundle
    ray.get(user.close.remote(), timeout=WAIT_S)
    assert_gone(pids)
    assert ray.util.placement_group_table(strategy.placement_group)["state"] == "CREATED"


@pytest.mark.slow
def test_a_group_with_too_little_is_refused_with_what_each_bundle_has(group_of: Scheduling, model: str) -> None:
    import ray

    def refused(cpus: list[float], said: str, **settings: Any) -> None:
        def task() -> None:
            from distributed_sparse import LLM

            LLM(model, **{"tensor_parallel_size": 2, "device": "auto"} | settings)

        remedy = r"lower tensor_parallel_size, or make the engine outside the group"
        with pytest.raises(ValueError, match=said + ".*" + remedy):
            ray.get(ray.remote(num_cpus=1)(task).options(scheduling_strategy=group_of(*cpus)).remote(), timeout=WAIT_S)

    refused([1], "asks for 2 CPUs, but the placement group .* in bundle 0: 0 of 1; add bundles with one CPU per rank")
    refused([1, 1], r"came free within 1 s: the placement group .* bundle 0: 0 of 1, bundle 1: 1 of 1", startup_timeout_s=1.0)
    refused([1, 1], "but the placement group .* has unused GPUs in bundle 0: 0 of 0, bundle 1: 0 of 0", device="cuda")
