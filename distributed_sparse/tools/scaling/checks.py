"""checks: checks of every point. Each returns its failures as sentences; any failure fails the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from distributed_sparse.tools.common.margin import TIE, first_difference
from distributed_sparse.tools.common.results import Record
from distributed_sparse.utils.validation import check_bool, check_float, check_int, check_keys

ROUNDED = 2e-5
"""Relative tolerance of numbers that are stored with six digits."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Which checks run, and their tolerances.

    Attributes:
        tokens: points that differ only in their placement generate the same tokens as the point of the fewest ranks.
        compared_prompts: requests compared, the first ones.
        tie_margin: in float32, tokens may first differ where the reference's margin is below this, in standard deviations of
            the logits.
        agreement: in bfloat16 and float16, least share of the reference's greedy tokens that are the most likely ones at a
            point, given the same tokens before.
        decided_margin: excludes tokens whose margin is below this from `agreement`; 0 counts all. With random weights
            (`load_format: dummy`), a large vocabulary's best logits are closer together than bfloat16 can resolve.
        weight_bytes, cache_bytes: each rank holds exactly its share.
        all_reduce: calls and payload match the model's shape.
        density: as configured, exactly where the budget decides; else above 0 and at most what the settings allow.
        leaks: nothing of an engine remains after it.
    """

    tokens: bool = True
    compared_prompts: int = 8
    tie_margin: float = TIE
    agreement: float = 0.995
    decided_margin: float = 0.0
    weight_bytes: bool = True
    cache_bytes: bool = True
    all_reduce: bool = True
    density: bool = True
    leaks: bool = True

    def __post_init__(self) -> None:
        for name in ("tokens", *OF_A_POINT):
            check_bool(f"checks.{name}", getattr(self, name))
        check_int("checks.compared_prompts", self.compared_prompts, 1, remedy="give a number of requests")
        check_float("checks.tie_margin", self.tie_margin, 0.0, remedy="0.0001 is usual")
        check_float("checks.agreement", self.agreement, 0.0, 1.0, remedy="0.995 is usual")
        check_float("checks.decided_margin", self.decided_margin, 0.0, remedy="0 counts every token")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str) -> Checks:
        """Checks from the keys in `given`; `where` names their origin in errors."""
        check_keys(given, [f.name for f in fields(cls)], where)
        return cls(**given)


@dataclass(frozen=True)
class Outcome:
    """One check of one point. `failures` is empty if it holds, None if there is nothing to compare with."""

    check: str
    point: str
    failures: list[str] | None


def weight_bytes(record: Record) -> list[str]:
    """Compare each rank's weights with its slices of the checkpoint, and all ranks' with the whole model.

    The second comparison counts replication and padding independently of the slices, so it detects a cut that replicates too
    much.
    """
    wanted, of_all = record["expected"]["weight_bytes"], record["expected"]["weight_bytes_of_all_ranks"]
    found = [
        f"rank {rank['rank']} holds {rank['weight_bytes']} bytes of weights, and its share is {wanted}"
        for rank in record["ranks"]
        if rank["weight_bytes"] != wanted
    ]
    held = sum(rank["weight_bytes"] for rank in record["ranks"])
    if held != of_all:
        found.append(
            f"{len(record['ranks'])} ranks together hold {held} bytes of weights, and the share of all, with "
            f"replicated weights and padding, is {of_all}"
        )
    return found


def cache_bytes(record: Record) -> list[str]:
    """Compare K, V and metadata of each rank's pages with the whole model's pages over the ranks."""
    num_ranks = len(record["ranks"])
    pages = record["pages"] + 1  # and the null page
    return [
        f"rank {rank['rank']} holds {name}={rank[name]} in {pages} pages, and its share is {whole * pages / num_ranks:g}"
        for rank in record["ranks"]
        for name, whole in record["expected"]["page_bytes_of_all_ranks"].items()
        if rank[name] * num_ranks != whole * pages
    ]


def all_reduce(record: Record) -> list[str]:
    """Check that there is a whole number of steps' calls, and one payload per token that went through the model."""
    found, sent, expected = [], record["all_reduce"], record["expected"]["all_reduce"]
    if sent["bytes"] != expected["bytes"]:
        found.append(f"{sent['bytes']} bytes went through all-reduce, and the model's shape predicts {expected['bytes']}")
    steps, each = record["steps"], expected["calls_per_step"]
    if sent["calls"] != each * steps:
        found.append(f"{sent['calls']} all-reduce calls, and {steps} steps of {each} predict {each * steps}")
    return found


def density(record: Record) -> list[str] | None:
    """Compare each layer's and KV head's attended tokens with the budget, or with the maximum if they depend on the data."""
    measured, expected = record["density"]["layers"], record["expected"]
    if measured is None:
        return None
    found = []
    for layer, (heads, wanted, most) in enumerate(zip(measured, expected["density"], expected["density_at_most"], strict=True)):
        for head, value in enumerate(heads):
            if wanted is None:
                if not 0 < value <= most * (1 + ROUNDED):
                    found.append(f"layer {layer}, KV head {head}: density {value:g} is not within (0, {most:g}]")
            elif abs(value - wanted) > ROUNDED * wanted:
                found.append(f"layer {layer}, KV head {head}: density {value:g}, and the settings say {wanted:g}")
    return found


def leaks(record: Record) -> list[str]:
    """List what remained after the engine's shutdown (also a failed engine's), and pages in use after all requests."""
    used = record.get("pages_used_at_end")  # missing if the point failed
    found = [f"{used} pages were in use when all requests had ended"] if used else []
    return found + [f"left behind: {what}" for what in record["left_behind"]]


OF_A_POINT: dict[str, Callable[[Record], list[str] | None]] = {
    check.__name__: check for check in (weight_bytes, cache_bytes, all_reduce, density, leaks)
}


def check_points(records: Sequence[tuple[str, str, Record]], checks: Checks) -> list[Outcome]:
    """Run every enabled check on every measured point.

    Args:
        records: (label, group, record) of the points, the point of the fewest ranks first within its group; a failed point has
            an "error".
    """
    found = []
    for label, _, record in records:
        names = ["leaks"] if "error" in record else list(OF_A_POINT)
        found += [Outcome(name, label, OF_A_POINT[name](record)) for name in names if getattr(checks, name)]
    return found + (list(_tokens(records, checks)) if checks.tokens else [])


def _tokens(records: Sequence[tuple[str, str, Record]], checks: Checks) -> Iterator[Outcome]:
    for _, group, record in records:
        members = [one for one in records if one[1] == group]
        if members[0][2] is not record or len(members) == 1:
            continue
        for label, _, other in members:
            if "error" not in other:
                failures = ["its reference failed"] if "error" in record else token_failures(record, other, checks)
                yield Outcome("tokens", label, failures)


def token_failures(reference: Record, record: Record, checks: Checks) -> list[str] | None:
    """Where a point's tokens differ from the reference's by more than rounding can explain (promise B of the design).

    Compares as many requests as configured and stored by both points. In low precision, the result for the reference itself is
    None. In float32, its measured tokens are compared with those that it generated again with margins.
    """
    compared = min(checks.compared_prompts, len(reference["reference"]["token_ids"]), len(record["token_ids"]))
    given = {name: of_requests[:compared] for name, of_requests in reference["reference"].items()}
    if record["dtype"] == "float32":
        return [
            f"request {number}: token {step} differs at a margin of {margin:.1e} standard deviations"
            for number, (expected, found, margins) in enumerate(
                zip(given["token_ids"], record["token_ids"][:compared], given["margins"], strict=True)
            )
            if (step := first_difference(expected, found)) is not None
            and (margin := margins[step] if step < len(margins) else float("inf")) >= checks.tie_margin
        ]
    if record is reference:
        return None
    decided = sum(margin >= checks.decided_margin for margins in given["margins"] for margin in margins)
    differing = sum(
        given["margins"][number][step] >= checks.decided_margin for number, step in record["disagreements"] if number < compared
    )
    if not decided:
        return [f"no token of the reference was chosen by a margin of {checks.decided_margin:g}; lower decided_margin"]
    share = 1 - differing / decided
    if share >= checks.agreement:
        return []
    return [f"the most likely token is the reference's in {share:.2%} of {decided} positions, below {checks.agreement:.2%}"]
