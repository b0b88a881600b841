"""A bundle whose upload is cut off at any moment becomes whole afterwards, at either end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedark.foundation.errors import InputError, ProtocolError
from fedark.foundation.keys import SigningKey
from fedark.operate.host.catalogue import Catalogue
from fedark.operate.node.hostsync import HostSync
from fedark.vault.bundle import SealedBundle, seal
from fedark.vault.manifest import ModelCard, ReleasePolicy

PROVIDER = SigningKey()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> SealedBundle:
    model, sealed = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("sealed") / "b"
    save_file({"w": np.frombuffer(os.urandom(5000), dtype=np.uint8)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    card = ModelCard(name="m", title="M", licence="none", task="classification")
    seal(
        model,
        sealed,
        provider=PROVIDER,
        card=card,
        policy=ReleasePolicy(expires="2999-01-01T00:00:00+00:00", platforms=("simulated",)),
    )
    return SealedBundle.load(sealed, PROVIDER.public)


@pytest.fixture
def parts(bundle: SealedBundle) -> tuple[str, bytes, bytes]:
    manifest = (bundle.path / "manifest").read_bytes()
    return bundle.manifest.digest().hex(), manifest, (bundle.path / "payload").read_bytes()


class _Killed(BaseException):
    pass


@pytest.fixture
def cut(parts: tuple[str, bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue whose process ended after the last piece and before the bundle was found to be
    whole.
    """
    digest, manifest, payload = parts

    def die(*_: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "_finish", die)
        catalogue = Catalogue(tmp_path / "c", limit=1 << 30)
        catalogue.begin(digest, manifest, PROVIDER.public)
        with pytest.raises(_Killed):
            catalogue.add(digest, 0, payload)
    return tmp_path / "c"


def test_a_provider_that_comes_again_finds_it_whole(
    cut: Path, parts: tuple[str, bytes, bytes]
) -> None:
    digest, manifest, payload = parts
    catalogue = Catalogue(cut, limit=1 << 30)
    catalogue.begin(digest, manifest, PROVIDER.public)
    held = catalogue.held(digest)
    assert held is not None
    assert held.whole
    assert catalogue.piece(digest, 0) == payload


def test_a_customer_that_fetches_again_finds_it_whole(
    cut: Path, parts: tuple[str, bytes, bytes]
) -> None:
    digest, manifest, payload = parts

    class Source:
        def manifest(self, digest: str) -> bytes:
            return manifest

        def piece(self, digest: str, offset: int) -> bytes:
            return payload[offset : offset + 100]

    sync = object.__new__(HostSync)
    sync._catalogue = Catalogue(cut, limit=1 << 30)
    sync._node = type("Node", (), {"catalogue": cut})  # type: ignore[assignment]
    assert sync._fetch(Source(), digest, PROVIDER.public)  # type: ignore[arg-type]
    assert sync._catalogue.piece(digest, 0) == payload


def test_what_is_not_what_the_manifest_says_is_dropped_then_too(
    cut: Path, parts: tuple[str, bytes, bytes]
) -> None:
    digest, manifest, payload = parts
    (cut / f"{digest}.part" / "payload").write_bytes(bytes(len(payload)))
    catalogue = Catalogue(cut, limit=1 << 30)
    with pytest.raises(ProtocolError, match="not what its manifest says"):
        catalogue.begin(digest, manifest, PROVIDER.public)
    assert catalogue.held(digest) is None
    with pytest.raises(InputError, match="has not come"):
        catalogue.add(digest, 0, payload)
