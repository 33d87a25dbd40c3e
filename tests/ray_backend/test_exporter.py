"""The engine's metrics reach whoever scrapes a node's metrics port, under vLLM's names."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.driver.engine_metrics import METRICS
from tests.support.checkpoints import tiny_checkpoint
from tests.support.patience import WAIT_S

pytestmark = pytest.mark.ray

NUM_REQUESTS, PROMPT, MAX_TOKENS = 3, [1, 5, 9, 30], 20


def scrape(model: str) -> dict[str, float]:
    """What every node of the cluster offers to Prometheus of one engine, by name and labels other than Ray's own."""
    import ray

    found: dict[str, float] = {}
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for line in urllib.request.urlopen(url, timeout=WAIT_S).read().decode().splitlines():
            sample = re.fullmatch(r"(\w+)\{(.*)\} (\S+).*", line)
            if sample is not None and f'model_name="{model}"' in sample[2]:
                name, labels, value = sample.groups()
                own = [label for label in labels.split(",") if label.startswith(("finished_reason=", "le="))]
                found["|".join([name, *own])] = float(value)
    return found


@pytest.mark.slow
def test_a_running_engine_can_be_scraped(local_ray: None, tmp_path: Path) -> None:
    model = str(tiny_checkpoint(tmp_path / "model"))
    settings = {"device": "cpu", "max_model_len": 256, "max_num_seqs": 8, "tensor_parallel_size": 2}
    with LLM(model, sparse={"method": "quest", "token_budget": 32, "recent_pages": 1}, **settings) as llm:
        os.kill(llm.stats()["ranks"][1]["pid"], signal.SIGKILL)
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, n=2)
        outputs = llm.generate([PROMPT] * NUM_REQUESTS, params, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * NUM_REQUESTS
        deadline = time.monotonic() + WAIT_S
        while (found := scrape(model)).get("ray_generation_tokens_total", 0.0) < 2 * NUM_REQUESTS * MAX_TOKENS:
            assert time.monotonic() < deadline, f"scraped only {found}"
            time.sleep(0.5)
    names = {name.partition("|")[0] for name in found}
    for metric in METRICS:
        suffix = {"gauge": "", "counter": "_total", "histogram": "_bucket"}[metric.kind]
        assert f"ray_{metric.name}{suffix}" in names, f"{metric.name} cannot be scraped: {sorted(names)}"
    assert found["ray_recoveries_total"] == 1
    assert found["ray_prompt_tokens_total"] == NUM_REQUESTS * len(PROMPT)
    assert found['ray_request_success_total|finished_reason="length"'] == 2 * NUM_REQUESTS
    assert found["ray_time_to_first_token_seconds_count"] == NUM_REQUESTS
    assert found["ray_e2e_request_latency_seconds_count"] == NUM_REQUESTS
    assert found["ray_inter_token_latency_seconds_count"] == 2 * NUM_REQUESTS * (MAX_TOKENS - 1)
    assert found["ray_request_generation_tokens_count"] == 2 * NUM_REQUESTS  # its sum is Ray's estimate, from the buckets
    assert 0 < found["ray_attended_density"] <= 1 and found["ray_all_reduce_time_seconds"] > 0
    assert found["ray_num_requests_running"] == 0 and found["ray_kv_cache_usage_perc"] == 0
