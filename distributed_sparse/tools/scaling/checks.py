"""checks: what must hold of every point. Each returns failures as sentences; one of them fails the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from distributed_sparse.tools.common.margin import TIE, first_difference
from distributed_sparse.tools.common.results import Record
from distributed_sparse.utils.validation import check_bool, check_float, check_int, check_keys

ROUNDED = 2e-5
"""Relative slack of numbers that are kept with six digits."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """What is checked, and how strictly.

    Attributes:
        tokens: points that differ in their placement alone generate the same tokens as the one of the fewest ranks.
        compared_prompts: of the first so many requests.
        tie_margin: in float32 a first difference may stand where the reference's margin is below it, in standard deviations
            of the logits.
        agreement: in bfloat16 and float16, least share of the reference's greedy tokens that a point finds the most likely,
            given the same tokens before.
        decided_margin: leaves out of it the tokens whose margin is below this. 0 counts all of them; random weights
            (`load_format: dummy`) leave a large vocabulary's best logits closer together than bfloat16 can tell.
        weight_bytes, cache_bytes: each rank holds its share, neither more nor less.
        all_reduce: calls and payload are those of the model's shape.
        density: as configured, exactly where the budget decides; above 0 and no more than the settings allow where the data
            does.
        leaks: nothing of an engine is left after it.
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
        for name in ("tokens", *(check.name for check in OF_A_POINT)):
            check_bool(f"checks.{name}", getattr(self, name))
        check_int("checks.compared_prompts", self.compared_prompts, 1, remedy="give a number of requests")
        check_float("checks.tie_margin", self.tie_margin, 0.0, remedy="0.0001 is usual")
        check_float("checks.agreement", self.agreement, 0.0, 1.0, remedy="0.995 is usual")
        check_float("checks.decided_margin", self.decided_margin, 0.0, remedy="0 counts every token")

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str) -> Checks:
        """Checks of the keys in `given`; `where` names their origin in errors."""
        check_keys(given, [f.name for f in fields(cls)], where)
        return cls(**given)


@dataclass(frozen=True)
class Outcome:
    """One check of one point: `failures` is empty where it holds; None where there is nothing to check it by."""

    check: str
    point: str
    failures: list[str] | None


class WeightBytes:
    """Weights of each rank against its slices of the checkpoint; of all ranks against the whole model.

    The second counts what is replicated and padded apart from the slices, so a cut that replicates too much does not pass.
    """

    name = "weight_bytes"

    def __call__(self, record: Record) -> list[str]:
        wanted, of_all = record["expected"]["weight_bytes"], record["expected"]["weight_bytes_of_all_ranks"]
        found = [
            f"rank {rank['rank']} holds {rank['weight_bytes']} bytes of weights, and its share is {wanted}"
            for rank in record["ranks"]
            if rank["weight_bytes"] != wanted
        ]
        held = sum(rank["weight_bytes"] for rank in record["ranks"])
        if held != of_all:
            found.append(
                f"{len(record['ranks'])} ranks together hold {held} bytes of weights, and the whole model, with what each of "
                f"them needs and padding, is {of_all}"
            )
        return found


class CacheBytes:
    """K, V and metadata of each rank's pages against those of the whole model's pages over the ranks."""

    name = "cache_bytes"

    def __call__(self, record: Record) -> list[str]:
        found, num_ranks = [], len(record["ranks"])
        pages = record["pages"] + 1  # and the null page
        for rank in record["ranks"]:
            for name, whole in record["expected"]["page_bytes_of_all_ranks"].items():
                if rank[name] * num_ranks != whole * pages:
                    found.append(
                        f"rank {rank['rank']} holds {name}={rank[name]} in {pages} pages, and its share is "
                        f"{whole * pages / num_ranks:g}"
                    )
        return found


class AllReduce:
    """Calls in whole steps of the model's calls each, one payload for every token that went through the model."""

    name = "all_reduce"

    def __call__(self, record: Record) -> list[str]:
        found, sent, expected = [], record["all_reduce"], record["expected"]["all_reduce"]
        if sent["bytes"] != expected["bytes"]:
            found.append(f"{sent['bytes']} bytes went through all-reduce, and the model's shape predicts {expected['bytes']}")
        steps, each = record["steps"], expected["calls_per_step"]
        if sent["calls"] != each * steps:
            found.append(f"{sent['calls']} all-reduce calls, and {steps} steps of {each} predict {each * steps}")
        return found


class Density:
    """Tokens attended by every layer and KV head against the budget's; where the data decides, against the most it may."""

    name = "density"

    def __call__(self, record: Record) -> list[str] | None:
        density = record["density"]["layers"]
        if density is None:
            return None
        found = []
        expected = record["expected"]
        rows = zip(density, expected["density"], expected["density_at_most"], strict=True)
        for layer, (heads, wanted, most) in enumerate(rows):
            for head, value in enumerate(heads):
                if wanted is None:
                    if not 0 < value <= most * (1 + ROUNDED):
                        found.append(f"layer {layer}, KV head {head}: density {value:g} is not within (0, {most:g}]")
                elif abs(value - wanted) > ROUNDED * wanted:
                    found.append(f"layer {layer}, KV head {head}: density {value:g}, and the settings say {wanted:g}")
        return found


class Leaks:
    """What was still there after the engine's shutdown, a failed one's too, and pages in use when all requests had ended."""

    name = "leaks"

    def __call__(self, record: Record) -> list[str]:
        used = record.get("pages_used_at_end")  # a point that failed has none
        found = [f"{used} pages were in use when all requests had ended"] if used else []
        return found + [f"left behind: {what}" for what in record["left_behind"]]


OF_A_POINT: tuple[Any, ...] = (WeightBytes(), CacheBytes(), AllReduce(), Density(), Leaks())


def check_points(records: Sequence[tuple[str, str, Record]], checks: Checks) -> list[Outcome]:
    """Every check that is wanted, of every point that was measured.

    Args:
        records: (label, group, record) of the points, the one of the fewest ranks first within its group; points that failed
            have an "error".
    """
    found = []
    for label, _, record in records:
        made = [c for c in OF_A_POINT if "error" not in record or isinstance(c, Leaks)]
        found += [Outcome(c.name, label, c(record)) for c in made if getattr(checks, c.name)]
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

    Of as many requests as are wanted and both points have kept. None for a reference in low precision: it is compared with
    nothing. (In float32 its measured tokens are, with those that it generated once more with their margins.)
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
