"""Sealing and opening on a real disk: whole or not at all, safetensors and text or not at all, in
little memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attacks import refusing
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import fedark.vault.bundle as bundle_module
from fedark.bench import seal as bench
from fedark.foundation.errors import InputError, ModelError, Refused, SealBroken, StorageError
from fedark.foundation.keys import SigningKey
from fedark.vault.bundle import SealedBundle, open_directory, seal, select
from fedark.vault.manifest import Manifest, ModelCard, ReleasePolicy
from fedark.vault.opener import open_to_memory

Make = Callable[..., Any]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def opened(bundle: SealedBundle, key: Any) -> dict[str, bytes]:
    files, _ = open_to_memory(bundle.manifest, key, bundle.payload())
    return {name: bytes(data) for name, data in files.items()}


def test_a_model_directory_comes_back_byte_for_byte_without_its_documentation(
    model: Path, tmp_path: Path, small_chunks: int, terms: dict[str, Any]
) -> None:
    provider = SigningKey()
    manifest, key = seal(model, tmp_path / "b.fedark", provider=provider, **terms)
    bundle = SealedBundle.load(tmp_path / "b.fedark", provider.public)
    bundle.check_payload()
    expected = {name: data for name, data in contents(model).items() if name != "README.md"}
    assert opened(bundle, key) == expected
    open_directory(bundle, key, tmp_path / "out")
    assert contents(tmp_path / "out") == expected
    assert {entry.name: entry.sha384 for entry in manifest.files} == {
        name: hashlib.sha384(data).digest() for name, data in expected.items()
    }
    assert manifest.chunks > 10


@settings(max_examples=25)
@given(
    weights=st.sampled_from([1, 900, 1024, 2048, 3071, 3072, 3073]) | st.integers(1, 9000),
    piece=st.integers(1, 5000),
)
def test_any_size_of_model_survives_any_size_of_piece(weights: int, piece: int) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundle_module, "CHUNK", 1024)
        model = Path(name, "model")
        model.mkdir()
        save_file(
            {"w": np.frombuffer(os.urandom(weights), dtype=np.uint8)}, model / "model.safetensors"
        )
        (model / "config.json").write_text("{}")
        provider = SigningKey()
        card = ModelCard(name="m", title="M", licence="none", task="classification")
        policy = ReleasePolicy(expires="2999-01-01T00:00:00+00:00", platforms=("simulated",))
        manifest, key = seal(model, Path(name, "b"), provider=provider, card=card, policy=policy)
        bundle = SealedBundle.load(Path(name, "b"), provider.public)
        files, _ = open_to_memory(manifest, key, bundle.payload(piece))
        assert {name: bytes(data) for name, data in files.items()} == contents(model)


def test_the_plaintext_is_nowhere_in_the_bundle(world: Any) -> None:
    sealed_bytes = b"".join(contents(world.bundle.path).values())
    for data in contents(world.folder / "first-model").values():
        for start in range(0, len(data) - 63, 64):
            assert data[start : start + 64] not in sealed_bytes


def test_two_seals_of_one_model_share_neither_key_nor_bytes(make_bundle: Make) -> None:
    provider = SigningKey()
    (one, key), (two, other) = make_bundle("one", provider), make_bundle("two", provider)
    assert one.manifest.digest() != two.manifest.digest()
    for bundle, wrong in ((one, other), (two, key)):
        with pytest.raises(SealBroken, match="commits to"):
            opened(bundle, wrong)


def test_progress_ends_at_the_total(
    model: Path, tmp_path: Path, small_chunks: int, terms: dict[str, Any]
) -> None:
    steps = list[tuple[int, int]]()
    seal(
        model,
        tmp_path / "b",
        provider=SigningKey(),
        progress=lambda done, total: steps.append((done, total)),
        **terms,
    )
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] == select(model).total


def test_data_sets_are_sealed_along_under_extra(
    model: Path, tmp_path: Path, terms: dict[str, Any]
) -> None:
    replay = tmp_path / "replay.csv"
    replay.write_text("prompt,answer\na,b\n")
    provider = SigningKey()
    _, key = seal(model, tmp_path / "b", provider=provider, extra={"replay.csv": replay}, **terms)
    files = opened(SealedBundle.load(tmp_path / "b", provider.public), key)
    assert files["extra/replay.csv"] == replay.read_bytes()


# -- attacks on the bundle


@pytest.mark.attack("substituted weights")
def test_a_swapped_payload_is_refused_by_the_enclave_and_by_the_keyless_check(
    world: Any, make_bundle: Make
) -> None:
    other, _ = make_bundle("other", world.keys.signing)
    (world.bundle.path / "payload").write_bytes((other.path / "payload").read_bytes())
    bundle = SealedBundle.load(world.bundle.path, world.keys.signing.public)
    with refusing(), pytest.raises(SealBroken, match="Chunk 0"):
        opened(bundle, world.key)
    with refusing(), pytest.raises(SealBroken, match="not the one that its provider sealed"):
        bundle.check_payload()


def test_other_weights_sealed_under_the_same_manifest_and_key_are_found_by_the_keyless_check(
    world: Any,
) -> None:
    # The key's holder can make chunks that open. The manifest's digest of the payload leaves it no
    # second payload.
    manifest = world.manifest
    cipher = world.key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
    bad = bytearray()
    for index in range(manifest.chunks):
        size = min(manifest.chunk_size, manifest.total - index * manifest.chunk_size)
        data = bundle_module.associated_data(
            manifest.bundle_id, index, index == manifest.chunks - 1
        )
        bad += cipher.encrypt(bundle_module.nonce(index), bytes(size), data)
    (world.bundle.path / "payload").write_bytes(bad)
    bundle = SealedBundle.load(world.bundle.path, world.keys.signing.public)
    with pytest.raises(SealBroken, match="not the one that its provider sealed"):
        bundle.check_payload()
    with pytest.raises(SealBroken, match="not to the files of its manifest"):
        open_directory(bundle, world.key, world.folder / "out")
    assert not (world.folder / "out").exists()


def test_a_swapped_manifest_is_refused(world: Any, make_bundle: Make) -> None:
    stranger, _ = make_bundle("stranger", SigningKey())
    (world.bundle.path / "manifest").write_bytes(stranger.manifest.encode())
    with pytest.raises(Refused, match="does not verify"):
        SealedBundle.load(world.bundle.path, world.keys.signing.public)
    own, _ = make_bundle("own", world.keys.signing)
    (world.bundle.path / "manifest").write_bytes(own.manifest.encode())
    with pytest.raises(SealBroken):
        opened(SealedBundle.load(world.bundle.path, world.keys.signing.public), world.key)


@pytest.mark.parametrize("change", [-1, 1, -2000])
def test_a_payload_of_another_length_is_refused_before_it_is_read(world: Any, change: int) -> None:
    path = world.bundle.path / "payload"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(SealBroken, match="bytes, not the"):
        SealedBundle.load(world.bundle.path, world.keys.signing.public)


def test_a_flipped_bit_on_the_disk_leaves_no_opened_directory(world: Any) -> None:
    path = world.bundle.path / "payload"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = tree(world.folder)
    with pytest.raises(SealBroken):
        open_directory(
            SealedBundle.load(world.bundle.path, world.keys.signing.public),
            world.key,
            world.folder / "out",
        )
    assert tree(world.folder) == before


def test_a_missing_or_oversized_manifest_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        SealedBundle.load(tmp_path / "none", SigningKey().public)
    (tmp_path / "manifest").write_bytes(bytes(3 << 20))
    with pytest.raises(Exception, match="over the limit"):
        SealedBundle.load(tmp_path, SigningKey().public)


# -- what may be sealed


FOREIGN = (
    *("pytorch_model.bin", "model.pt", "x.pkl", "training_args.bin", "original/params.pth"),
    *("modeling_custom.py", "handler.py", "run.sh", "onnx/model.onnx", "tf_model.h5"),
    *("model.gguf", "odd name.json", "Modelfile", "images/plot.png", "extra/replay.csv"),
    *("consolidated.safetensors", "openvino/model.safetensors", "demo.ipynb", "chat.jinja"),
)


def test_of_a_cloned_folder_the_model_is_sealed_and_the_rest_is_named(
    model: Path, tmp_path: Path, terms: dict[str, Any]
) -> None:
    expected = {name: data for name, data in contents(model).items() if name != "README.md"}
    for name in FOREIGN:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"x")
    assert set(FOREIGN) < set(select(model).left_out)
    provider = SigningKey()
    _, key = seal(model, tmp_path / "b", provider=provider, **terms)
    assert opened(SealedBundle.load(tmp_path / "b", provider.public), key) == expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "tf_model.h5", "model.gguf"])
def test_weights_that_are_there_only_in_a_form_that_can_run_code_are_refused(
    model: Path, tmp_path: Path, terms: dict[str, Any], name: str
) -> None:
    (model / "model.safetensors").rename(model / name)
    before = tree(tmp_path)
    with pytest.raises(ModelError, match=rf"{name} are never opened.*save_pretrained"):
        seal(model, tmp_path / "b", provider=SigningKey(), **terms)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["x.pkl", "model.py", "odd name.csv", "../up.csv"])
def test_a_data_set_of_a_name_that_is_not_sealed_is_refused(model: Path, name: str) -> None:
    with pytest.raises(ModelError, match="cannot be sealed"):
        select(model, {name: model / "vocab.txt"})


def test_the_parts_that_an_index_names_are_sealed_and_no_others(model: Path) -> None:
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name in (*parts, "model-00001-of-00003.safetensors"):
        (model / name).write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", parts, strict=True))}))
    selected = select(model)
    assert [name for name in selected.files if name.endswith(".safetensors")] == parts
    assert "model-00001-of-00003.safetensors" in selected.left_out
    (model / parts[1]).unlink()
    with pytest.raises(ModelError) as caught:
        select(model)
    assert f"names {parts[1]}, which is missing" in caught.value.what
    for bad in ('{"weight_map": {"a": "../up.safetensors"}}', '{"weight_map": {}}', "[]", "{"):
        index.write_text(bad)
        with pytest.raises(ModelError, match=r"index\.json is malformed"):
            select(model)


def test_a_hub_cache_is_sealed_from_its_snapshot(model: Path, tmp_path: Path) -> None:
    """blobs/ under their digests, snapshots/REVISION/ with links to them, refs/main."""
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    for revision in ("old", "new"):
        for name in contents(model):
            link = cache / "snapshots" / revision / name
            link.parent.mkdir(parents=True, exist_ok=True)
            blob = cache / "blobs" / hashlib.sha256(name.encode()).hexdigest()
            blob.write_bytes((model / name).read_bytes())
            link.symlink_to(os.path.relpath(blob, link.parent))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("new")
    selected = select(cache)
    assert set(selected.files) == set(select(model).files)
    assert selected.files["config.json"] == cache / "snapshots/new/config.json"
    (cache / "refs/main").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):  # which of the two is not known
        select(cache)
    blob = next((cache / "blobs").iterdir())
    blob.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        select(cache / "snapshots/old")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        pickle.dumps({"w": 1}),
        b"PK\x03\x04" + bytes(100),
        (1 << 40).to_bytes(8, "little") + b"{}",
    ],
)
def test_a_pickle_or_a_torn_download_named_safetensors_is_refused(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a safetensors file"):
        select(model)


def test_a_truncated_safetensors_file_is_refused(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="not a safetensors file"):
        select(model)


def test_a_directory_without_weights_or_config_is_refused_with_both_reasons(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("x")
    with pytest.raises(ModelError) as caught:
        select(tmp_path)
    assert "no weights" in caught.value.what
    assert "no config.json" in caught.value.what
    with pytest.raises(ModelError, match="not a directory"):
        select(tmp_path / "none")


def test_hidden_files_and_documentation_are_left_out_and_named(model: Path) -> None:
    (model / ".cache").mkdir()
    (model / ".cache" / "x.bin").write_bytes(b"x")
    (model / ".gitattributes").write_text("x")
    (model / "LICENSE.txt").write_text("x")
    assert select(model).left_out == (".cache/", ".gitattributes", "LICENSE.txt", "README.md")


def test_linked_files_are_sealed_by_content_and_linked_folders_are_not_walked(
    model: Path, tmp_path: Path, terms: dict[str, Any]
) -> None:
    blob = tmp_path / "blob"
    (model / "vocab.txt").rename(blob)
    (model / "vocab.txt").symlink_to(blob)  # as in a hub cache
    provider = SigningKey()
    _, key = seal(model, tmp_path / "b", provider=provider, **terms)
    assert (
        opened(SealedBundle.load(tmp_path / "b", provider.public), key)["vocab.txt"]
        == blob.read_bytes()
    )
    (model / "loop").symlink_to(model)
    assert "loop/" in select(model).left_out
    (model / "1_Pooling").rename(tmp_path / "pooling")
    (model / "1_Pooling").symlink_to(tmp_path / "pooling")
    assert "1_Pooling/config.json" in select(model).files


def test_what_is_no_regular_file_is_refused_without_waiting_on_it(model: Path) -> None:
    os.mkfifo(model / "merges.txt.pipe")
    assert "merges.txt.pipe" in select(model).left_out
    (model / "vocab.txt").unlink()
    os.mkfifo(model / "vocab.txt")
    with pytest.raises(ModelError, match="not a regular file"):
        select(model)


# -- the disk


def test_nothing_that_exists_is_overwritten(
    model: Path, tmp_path: Path, terms: dict[str, Any], world: Any
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "kept").write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        seal(model, tmp_path / "b", provider=SigningKey(), **terms)
    with pytest.raises(InputError, match="exists already"):
        open_directory(world.bundle, world.key, tmp_path / "b")
    assert contents(tmp_path / "b") == {"kept": b"kept"}


def test_a_file_that_grows_or_shrinks_while_it_is_sealed_leaves_no_bundle(
    model: Path, tmp_path: Path, small_chunks: int, terms: dict[str, Any]
) -> None:
    for size in (30_000, 10_000):

        def change(done: int, total: int, size: int = size) -> None:
            os.truncate(model / "model.safetensors", size)

        before = tree(tmp_path)
        original = (model / "model.safetensors").read_bytes()
        with pytest.raises(ModelError, match="changed while it was sealed"):
            seal(model, tmp_path / "b", provider=SigningKey(), progress=change, **terms)
        (model / "model.safetensors").write_bytes(original)
        assert tree(tmp_path) == before


def test_an_interrupt_leaves_nothing_behind(
    model: Path, tmp_path: Path, small_chunks: int, terms: dict[str, Any]
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        seal(model, tmp_path / "b", provider=SigningKey(), progress=interrupt, **terms)
    assert tree(tmp_path) == before


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_sealing_onto_a_full_disk_is_a_storage_error_and_leaves_it_empty(
    make_model: Make, full_disk: Path, terms: dict[str, Any]
) -> None:
    with pytest.raises(StorageError, match="No space left"):
        seal(make_model("large", weights=200_000), full_disk / "b", provider=SigningKey(), **terms)
    assert tree(full_disk) == set()


def test_opening_onto_a_full_disk_is_a_storage_error_and_leaves_it_empty(
    make_bundle: Make, full_disk: Path
) -> None:
    bundle, key = make_bundle("large", SigningKey(), weights=200_000)
    with pytest.raises(StorageError, match="No space left"):
        open_directory(bundle, key, full_disk / "out")
    assert tree(full_disk) == set()


def test_a_file_size_limit_is_a_storage_error_and_leaves_nothing(
    model: Path, tmp_path: Path, terms: dict[str, Any]
) -> None:
    before, limits = tree(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            seal(model, tmp_path / "b", provider=SigningKey(), **terms)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tree(tmp_path) == before


def test_a_place_that_does_not_exist_is_a_storage_error(
    model: Path, tmp_path: Path, terms: dict[str, Any]
) -> None:
    with pytest.raises(StorageError):
        seal(model, tmp_path / "none" / "b", provider=SigningKey(), **terms)


@pytest.mark.parametrize("action", ["seal", "open"])
def test_sealing_and_opening_need_no_more_memory_for_a_model_of_twenty_times_the_size(
    action: str, tmp_path: Path
) -> None:
    small, large = (bench._growth(action, tmp_path, size << 20) for size in (4, 80))
    assert large - small < 4, f"{small} MiB at 4 MiB, {large} MiB at 80 MiB"


def test_the_enclaves_half_of_the_vault_imports_nothing_that_reads_a_disk_of_models() -> None:
    code = (
        "import sys, fedark.vault.opener, fedark.vault.manifest; print('safetensors' in"
        " sys.modules, 'numpy' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]


def test_sealing_signs_with_the_providers_key(world: Any) -> None:
    with pytest.raises(Refused):
        Manifest.verify(world.manifest.encode(), SigningKey().public)
