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
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from distributed_sparse.model import checkpoint
from distributed_sparse.model.checkpoint import (
    TensorFiles,
    absolute_path,
    resolve_checkpoint,
    weight_files,
    weights_fingerprint,
)
from tests.support.checkpoints import tiny_checkpoint, transformers_model
from tests.support.dense_model import dense_logits

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
    with pytest.raises(ValueError, match="only safetensors are supported"):
        resolve_checkpoint(str(tmp_path))
    assert resolve_checkpoint(str(tmp_path), "dummy") == tmp_path


REPOSITORY = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling.py",
    "README.md", "pytorch_model.bin", "consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors",
    "original/model.safetensors", "original/params.json", "onnx/config.json",
]  # fmt: skip
DESCRIPTION = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"}
SHARDS = {"model-1.safetensors", "model-2.safetensors"}


@pytest.mark.parametrize(
    ("weights", "index", "fetched"),
    [
        (["model.safetensors"], None, {"model.safetensors"}),
        ([*SHARDS, "model-3.safetensors", "model.safetensors"], sorted(SHARDS), SHARDS | {"model.safetensors.index.json"}),
        (["w/a.safetensors"], ["w/a.safetensors"], {"w/a.safetensors", "model.safetensors.index.json"}),
        (sorted(SHARDS), None, SHARDS | {"model.fp16.safetensors"}),
    ],
)
def test_of_a_hub_repository_only_what_is_read_is_fetched_all_of_one_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: list[str], index: list[str] | None, fetched: set[str]
) -> None:
    files = dict.fromkeys(REPOSITORY + weights, "{}")
    if index is not None:
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {name: name for name in index}})

    def snapshot(repo: str, revision: str | None, **patterns: Any) -> str:
        """The hub's own filter over a repository in memory."""
        assert (repo, revision) in [("some-org/tiny", None), ("some-org/tiny", "c0ffee")]
        for name in filter_repo_objects(files, **patterns):
            (tmp_path / "c0ffee" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "c0ffee" / name).write_text(files[name])
        return str(tmp_path / "c0ffee")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    for load_format, expected in (("dummy", DESCRIPTION), ("auto", DESCRIPTION | fetched)):
        path = resolve_checkpoint("some-org/tiny", load_format)
        found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert found - {"model.safetensors.index.json"} == expected - {"model.safetensors.index.json"}


def test_a_hub_id_that_cannot_be_had_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot)
    with pytest.raises(
        ValueError, match=rf"'some-org/tiny' is not a folder on node {HOST}.*LocalEntryNotFoundError: no connection"
    ):
        resolve_checkpoint("some-org/tiny")


def test_the_index_says_which_files_are_read(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, max_shard_size="60KB")
    files = weight_files(path)
    for stray in ("consolidated.safetensors", "adapter_model.safetensors", "model.safetensors", "another.safetensors"):
        (path / stray).write_bytes(b"no weights of this model")
    assert weight_files(path) == files and len(files) > 3
    files[1].unlink()
    with pytest.raises(ValueError, match=f"names {files[1].name}, which is absent on node {HOST}.*delete the index if"):
        weight_files(path)


def sharded(folder: Path) -> tuple[Path, Path, Path]:
    """A checkpoint of two files and an index: its folder, and the files, which hold every other tensor."""
    path = tiny_checkpoint(folder, num_hidden_layers=1)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = (path / "a.safetensors", path / "b.safetensors")
    names = sorted(tensors)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, file)
    write_index(path, {name: file.name for name, file in weight_map.items()})
    return path, *files


def write_index(path: Path, weight_map: Any) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def add(file: Path, **tensors: torch.Tensor) -> None:
    save_file(load_file(file) | tensors if file.exists() else tensors, file)


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path: Path) -> None:
    """Not from the last file, by alphabet, that holds one of its name."""
    path, first, second = sharded(tmp_path)
    expected = transformers_model(path).state_dict()
    of_first, of_second = load_file(first), load_file(second)
    add(first, **{name: tensor + 1 for name, tensor in of_second.items()})
    add(second, **{name: tensor + 1 for name, tensor in of_first.items()})
    with TensorFiles(path) as files:
        assert set(files.file_of) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(files.tensor(name)[:], tensor)


@pytest.mark.parametrize(
    "stray", ["model.safetensors", "consolidated.safetensors", "adapter_model.safetensors", "z.safetensors"]
)
def test_a_file_beside_the_index_is_not_read(tmp_path: Path, stray: str, caplog: pytest.LogCaptureFixture) -> None:
    path, first, _ = sharded(tmp_path)
    before = dense_logits(path, [3, 4, 5])
    add(path / stray, **{name: tensor + 1 for name, tensor in load_file(first).items()})
    caplog.clear()
    assert torch.equal(dense_logits(path, [3, 4, 5]), before)
    # transformers reads model.safetensors there, and not the index: that is said.
    assert ("model.safetensors is not read" in caplog.text) == (stray == "model.safetensors")


@pytest.mark.parametrize("stray", ["consolidated.safetensors", "adapter_model.safetensors", "extra.safetensors"])
def test_without_an_index_model_safetensors_is_read_alone_as_in_transformers(tmp_path: Path, stray: str) -> None:
    path = tiny_checkpoint(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    other = "model.norm.weight" if stray != "extra.safetensors" else "lm_head.weight"
    add(path / stray, **{other: torch.ones(64) if other != "lm_head.weight" else torch.ones(331, 64)})
    with torch.no_grad():
        expected = transformers_model(path)(torch.tensor([[3, 4, 5]])).logits[0]
    torch.testing.assert_close(dense_logits(path, [3, 4, 5]), expected, rtol=0, atol=1e-4)


def test_files_without_an_index_are_read_together(tmp_path: Path) -> None:
    path, *_ = sharded(tmp_path)
    expected = dense_logits(path, [3, 4, 5])
    (path / "model.safetensors.index.json").unlink()
    assert torch.equal(dense_logits(path, [3, 4, 5]), expected)


@pytest.mark.parametrize("names", [("a", "b"), ("model", "z"), ("a", "model")])
def test_a_tensor_in_two_files_without_an_index_is_refused_with_both_files(tmp_path: Path, names: tuple[str, str]) -> None:
    path, first, second = sharded(tmp_path)
    (path / "model.safetensors.index.json").unlink()
    add(second, **{"model.norm.weight": torch.ones(64)})
    add(first, **{"model.norm.weight": torch.ones(64)})
    first.rename(path / f"{names[0]}.safetensors")
    second.rename(path / f"{names[1]}.safetensors")
    message = rf"tensor model.norm.weight is both in {path}/{names[0]}.safetensors and in {names[1]}.safetensors; keep one"
    with pytest.raises(ValueError, match=message):
        weights_fingerprint(path)


def test_an_unlisted_tensor_is_read_from_the_one_listed_file_that_holds_it(tmp_path: Path) -> None:
    path, first, second = sharded(tmp_path)
    with TensorFiles(path) as files:
        names = {name: file.name for name, file in files.file_of.items()}
    del names["model.norm.weight"]
    write_index(path, names)
    with TensorFiles(path) as files:
        assert files.file_of["model.norm.weight"] in (first, second)
    for file in (first, second):
        add(file, **{"model.norm.weight": torch.ones(64)})
    with pytest.raises(ValueError, match=r"model.norm.weight is both in .*a.safetensors and in b.safetensors"):
        TensorFiles(path)


def test_a_file_that_lacks_a_tensor_of_the_index_is_named(tmp_path: Path) -> None:
    path, first, second = sharded(tmp_path)
    with TensorFiles(path) as files:
        names = {name: file.name for name, file in files.file_of.items()}
    write_index(path, names | {"model.norm.weight": first.name})  # it is in the second
    assert "model.norm.weight" in load_file(second)
    with pytest.raises(ValueError, match=rf"index.json says that {first.name} holds tensor model.norm.weight, but it does not"):
        TensorFiles(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "index.json is not valid JSON"),
        ("[]", "index.json holds a list"),
        ("{}", "weight_map=None must be an object"),
        ('{"weight_map": {}}', r"weight_map=\{\} must be an object"),
        ('{"weight_map": ["a.safetensors"]}', "weight_map=.* must be an object"),
        *(
            (json.dumps({"weight_map": {"model.norm.weight": value}}), "model.norm.weight=.* must be the name of a file")
            for value in (None, 3, ["a.safetensors"], "", "../a.safetensors", "/a.safetensors")
        ),
        ('{"weight_map": {"model.norm.weight": "config.json"}}', "config.json cannot be read as safetensors"),
    ],
)  # fmt: skip
def test_a_malformed_index_is_named(tmp_path: Path, text: str, message: str) -> None:
    path, *_ = sharded(tmp_path)
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        TensorFiles(path)


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
