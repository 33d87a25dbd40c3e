"""Finding a checkpoint: a folder or a hub id, safetensors only, and a fingerprint that tells unequal copies apart."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from distributed_sparse.model import checkpoint
from distributed_sparse.model.checkpoint import absolute_path, resolve_checkpoint, weight_files, weights_fingerprint
from tests.support.checkpoints import tiny_checkpoint

HOST = socket.gethostname()


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tiny_checkpoint(tmp_path))) == tmp_path


def test_what_lies_here_has_an_absolute_path_and_a_hub_id_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "organisation" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("organisation/name", "./organisation/name", "~/organisation/name", str(tmp_path / "organisation/name")):
        assert absolute_path(given) == str(tmp_path / "organisation" / "name")
    for given in ("organisation/other", "other", "~no-such-user/name"):
        assert absolute_path(given) == given


@pytest.mark.parametrize("model", ["/no/such/folder", "./models/absent", "a/b/c"])
def test_an_absent_folder_is_named_with_the_node(model: str) -> None:
    with pytest.raises(ValueError, match=rf"no folder .* on node {HOST}; every node needs"):
        resolve_checkpoint(model)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        resolve_checkpoint(str(tmp_path / "model.safetensors"))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no config.json in {tmp_path} on node {HOST}"):
        resolve_checkpoint(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="only safetensors are read"):
        resolve_checkpoint(str(tmp_path))
    assert resolve_checkpoint(str(tmp_path), "dummy") == tmp_path


def test_a_hub_id_fetches_safetensors_json_and_tokenizer_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(tiny_checkpoint(tmp_path))

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    assert resolve_checkpoint("some-org/tiny") == tmp_path
    assert resolve_checkpoint("tiny-7B.v0", load_format="dummy") == tmp_path
    (first, with_weights), (second, without) = asked
    assert (first, second) == ("some-org/tiny", "tiny-7B.v0")
    assert "*.safetensors" in with_weights["allow_patterns"] and "*.safetensors" not in without["allow_patterns"]
    assert not any(pattern in with_weights["allow_patterns"] for pattern in ("*", "*.bin", "*.pt", "*.py"))


def test_a_hub_id_that_cannot_be_had_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    with pytest.raises(
        ValueError, match=rf"'some-org/tiny' is no folder on node {HOST}.*LocalEntryNotFoundError: no connection"
    ):
        resolve_checkpoint("some-org/tiny")


def test_the_index_says_which_files_are_read(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    files = weight_files(path)
    (path / "consolidated.safetensors").write_bytes(b"the same once more, under other names")
    assert weight_files(path) == files and len(files) > 3
    files[1].unlink()
    with pytest.raises(ValueError, match=f"names {files[1].name}, which is absent on node {HOST}"):
        weight_files(path)


def test_a_folder_without_weights_asks_for_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*.safetensors in .*load_format='dummy'"):
        weight_files(tmp_path)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read as safetensors"):
        weights_fingerprint(path)


def test_equal_copies_have_equal_fingerprints_wherever_they_lie(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "one", max_shard_size="60KB")
    copy = Path(shutil.copytree(path, tmp_path / "elsewhere" / "two"))
    assert weights_fingerprint(path) == weights_fingerprint(copy)
    assert len(weights_fingerprint(path)) == 64


def test_another_config_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    before = weights_fingerprint(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert weights_fingerprint(path) != before


def test_another_name_shape_or_dtype_changes_the_fingerprint_of_files_of_one_size(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    norm = tensors.pop("model.norm.weight").to(torch.float16)
    fingerprints, sizes = set(), set()
    for name, tensor in [
        ("model.norm.weight", norm.view(2, 32)),
        ("model.norm.weighs", norm.view(2, 32)),
        ("model.norm.weight", norm.view(4, 16)),
        ("model.norm.weight", norm.view(2, 32).view(torch.int16)),
    ]:
        save_file({**tensors, name: tensor}, path / "model.safetensors")
        fingerprints.add(weights_fingerprint(path))
        sizes.add((path / "model.safetensors").stat().st_size)
    assert len(fingerprints) == 4 and len(sizes) == 1


def test_another_size_of_a_file_changes_the_fingerprint(tmp_path: Path) -> None:
    """The same tensors behind a longer free-form header: another file, such as a later export."""
    path = tiny_checkpoint(tmp_path)
    before = weights_fingerprint(path)
    save_file(load_file(path / "model.safetensors"), path / "model.safetensors", metadata={"format": "pt", "note": "x" * 64})
    assert weights_fingerprint(path) != before


def test_dummy_weights_are_told_apart_by_their_config_alone(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    before = weights_fingerprint(path, "dummy")
    (path / "model.safetensors").unlink()
    assert weights_fingerprint(path, "dummy") == before
