"""Promise A: given its q, K, V and random key, a row's selection and output are the same bits wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distributed_sparse.selection.base import Policy, Selection
from tests.support.decode_rows import DecodeRows, listed

PolicyOf = Callable[[DecodeRows], Policy]


def row_bits(rows: DecodeRows, selection: Selection, row: int, head: int) -> list:
    """Everything that a (sequence, KV head) row is: pages, tokens, weight, what its partial read, and the attended output."""
    pages, tokens = row_lists(selection, row, head)
    weight = selection.log_weight[row, head].item() if tokens and selection.log_weight is not None else None
    group = rows.geometry.group_size
    output = rows.attend(selection)[row, head * group : (head + 1) * group]
    assert torch.isfinite(output).all()
    bits = output.view(torch.int32 if output.dtype == torch.float32 else torch.int16).tolist()
    return [pages, tokens, weight, row_lists(selection.partial_selection, row, head), bits]


def row_lists(selection: Selection | None, row: int, head: int) -> tuple[list[int], list[int]]:
    """(pages, token slots) that a row lists; none where there is no selection."""
    if selection is None:
        return [], []
    if selection.tokens is None or selection.num_tokens is None:
        return listed(selection, row, head), []
    return listed(selection, row, head), selection.tokens[row, head, : int(selection.num_tokens[row, head])].tolist()


def all_rows(rows: DecodeRows, policy_of: PolicyOf) -> list[list]:
    """[B][H_kv] of `row_bits`."""
    selection = rows.select(policy_of(rows))
    sequences, heads = selection.num_pages.shape
    return [[row_bits(rows, selection, row, head) for head in range(heads)] for row in range(sequences)]


def assert_rows_depend_on_themselves(rows: DecodeRows, policy_of: PolicyOf) -> None:
    """Each row alone, in another order and twice, in a wider page table, and with the heads split over two ranks and more."""
    expected = all_rows(rows, policy_of)
    count, heads = len(rows.keys), rows.geometry.num_kv_heads
    for row in range(count):  # alone, the host may know more than in the batch
        assert all_rows(rows.of_sequences([row]), policy_of) == [expected[row]], f"sequence {row} alone"
    order = [*range(count - 1, -1, -1), 0]
    assert all_rows(rows.of_sequences(order), policy_of) == [expected[row] for row in order], "another order"
    assert all_rows(rows.of_sequences(list(range(count)), spare_columns=37), policy_of) == expected, "a wider table"
    for ranks in (2, heads):
        share = heads // ranks
        parts = [all_rows(rows.of_heads(rank * share, (rank + 1) * share), policy_of) for rank in range(ranks)]
        together = [[own for part in parts for own in part[row]] for row in range(count)]
        assert together == expected, f"{ranks} ranks"
