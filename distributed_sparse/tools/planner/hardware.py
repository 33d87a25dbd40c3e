"""hardware: bytes and operations per second of a device: presets from public data sheets, with every number replaceable."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Protocol:
    """One algorithm of a collective: seconds to start, seconds per hop, share of the link's bandwidth that it reaches."""

    base_s: float
    hop_s: float
    share: float


@dataclass(frozen=True)
class Interconnect:
    """The links between the ranks of one node. `bandwidth`: bytes per second that a rank sends in one direction."""

    bandwidth: float
    protocols: tuple[Protocol, ...]

    def all_reduce_s(self, num_bytes: int, world_size: int) -> float:
        """Seconds of an all-reduce of `num_bytes` on each rank, as a ring: 2 (n - 1) hops, 2 (n - 1) / n of the bytes.

        The factor: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md. The fastest protocol counts.
        """
        hops = 2 * (world_size - 1)
        return self._fastest(hops, hops / world_size * num_bytes) if world_size > 1 else 0.0

    def all_gather_s(self, num_bytes: int, world_size: int) -> float:
        """Seconds to send `num_bytes` of each rank to all others: n - 1 hops, and n - 1 times the bytes."""
        hops = world_size - 1
        return self._fastest(hops, hops * num_bytes) if world_size > 1 else 0.0

    def broadcast_s(self, num_bytes: int, world_size: int) -> float:
        """Seconds to pass `num_bytes` along the ring."""
        return self._fastest(world_size - 1, num_bytes) if world_size > 1 else 0.0

    def _fastest(self, hops: int, num_bytes: float) -> float:
        return min(each.base_s + hops * each.hop_s + num_bytes / (self.bandwidth * each.share) for each in self.protocols)


# NCCL's own model of its rings (latencies baseLat and hwLat; LL reaches a quarter of the bandwidth, LL128 .92 of it):
# https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc, in the order LL, LL128, Simple. LL128 needs NVLink.
NVLINK_RING = (Protocol(3.6e-6, 0.47e-6, 0.25), Protocol(10.0e-6, 1.9e-6, 0.92), Protocol(8.4e-6, 3.4e-6, 1.0))
PCIE_RING = (Protocol(3.6e-6, 1.0e-6, 0.25), Protocol(8.4e-6, 5.7e-6, 1.0))


@dataclass(frozen=True)
class Rate:
    """A rate measured repeatedly on this machine: median, 10th and 90th percentile. `unit`: bytes/s, op/s or s."""

    name: str
    unit: str
    median: float
    low: float
    high: float

    @property
    def varied(self) -> float:
        """The 90th percentile over the 10th."""
        return self.high / self.low


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One rank's device and its links. Bandwidths in bytes, `flops_*` in operations per second (dense, no sparsity).

    The `*_share`s are shares of `bandwidth` that are reached; `flops_share` is that of the operations. `dense_share` applies to
    attention over whole contexts, `sparse_share` to attention over a selection, `select_share` to scoring. In the presets they
    are assumptions; `tools.bench.machine_rates` measures them.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops_16: float
    """With 16-bit weights."""
    flops_32: float
    """With float32 weights."""
    links: Interconnect
    weights_share: float = 0.85
    dense_share: float = 0.85
    # Quest's authors reach 88 to 95% of what the bytes allow over their dense kernel (arXiv 2406.10774): .9 of .85.
    sparse_share: float = 0.77
    select_share: float = 0.77
    flops_share: float = 0.6
    # The three are assumptions. An eager kernel that does almost nothing costs its launch from Python.
    kernel_s: float = 6e-6
    """Cost of each kernel beside its bytes, launched by itself."""
    graph_gap_s: float = 1e-6
    """Cost of each kernel in a CUDA graph beside its bytes, from the end of one to the begin of the next. Kernels that the host
    launches after the graph (sampling) are queued while it runs, and cost the same."""
    graph_launch_s: float = 5e-6
    """Launch of a graph, once per step."""
    driver_s: float = 0.43e-3
    """A step's time outside the slowest rank: schedule, send, commit (docs/benchmarks.md, "Overhead of a step")."""
    measured: bool = False
    rates: tuple[Rate, ...] = ()
    """Results of `tools.bench.machine_rates`, with their spread."""


def _gpu(name: str, gigabytes: float, bandwidth: float, flops_16: float, flops_32: float, links: Interconnect) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=int(gigabytes * GB),
        bandwidth=bandwidth * GB,
        flops_16=flops_16 * TERA,
        flops_32=flops_32 * TERA,
        links=links,
    )


def _nvlink(per_direction: float) -> Interconnect:
    return Interconnect(per_direction * GB, NVLINK_RING)


# PCIe 4.0 x16 is nominally 32 GB/s per direction; the payload is about 25.
_PCIE_4 = Interconnect(25 * GB, PCIE_RING)
# GeForce cards have no peer-to-peer access: every byte crosses the bus twice, through host memory.
_PCIE_4_THROUGH_HOST = Interconnect(12 * GB, PCIE_RING)

PRESETS = {
    gpu.name: gpu
    for gpu in (
        # SXM, 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways: https://www.nvidia.com/en-us/data-center/h100/
        _gpu("h100", 80, 3350, 989, 67, _nvlink(450)),
        # SXM, 141 GB, 4.8 TB/s: https://www.nvidia.com/en-us/data-center/h200/
        _gpu("h200", 141, 4800, 989, 67, _nvlink(450)),
        # SXM 80 GB, 2,039 GB/s, NVLink 600 GB/s both ways (NCCL's model takes no more than 235 on compute capability 8.0):
        # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
        _gpu("a100", 80, 2039, 312, 19.5, _nvlink(235)),
        # 48 GB, 864 GB/s, PCIe 4.0 x16, no NVLink: https://www.nvidia.com/en-us/data-center/l40s/
        _gpu("l40s", 48, 864, 362, 91.6, _PCIE_4),
        # HGX, 180 GB, 8 TB/s at most, NVLink 1.8 TB/s both ways: https://www.nvidia.com/en-us/data-center/hgx/
        _gpu("b200", 180, 8000, 2250, 80, _nvlink(900)),
        # 24 GB, 1,008 GB/s, 165 TFLOPS in bf16 with float32 sums, PCIe 4.0 x16:
        # https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
        _gpu("rtx4090", 24, 1008, 165, 82.6, _PCIE_4_THROUGH_HOST),
    )
}
"""GPUs by name."""

MEASURED = "cpu"
"""Name of the machine that the planner runs on, which has no preset and is measured."""
