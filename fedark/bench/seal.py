"""`fedark bench seal`: opening a sealed bundle against a plain read + AES-GCM pass over the same
bytes; sealing; memory.

The peer reads the same payload from the same page cache in the same chunk size into a buffer that
it keeps, and decrypts each chunk with AES-256-GCM into another that it keeps: the fastest way that
`cryptography` offers. It has no manifest, order, final flag, commitment or file borders. Memory is
the growth of the peak resident set (VmHWM) of a fresh process.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess  # nosec B404
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.numpy import save_file

from fedark.bench import Row, interleaved
from fedark.foundation.keys import SigningKey
from fedark.vault.bundle import CHUNK, SealedBundle, open_directory, seal
from fedark.vault.manifest import TAG_BYTES, ModelCard, ReleasePolicy
from fedark.vault.opener import Opener, associated_data, nonce, open_to_memory
from fedark.vault.weightkey import KeyStore, WeightKey

__all__ = ["rows"]

_MIB = 1 << 20
_SIZE = 256 * _MIB
_SMALL, _LARGE = 32 * _MIB, 512 * _MIB
_CARD = ModelCard(name="bench", title="Random bytes", licence="none", task="classification")
_POLICY = ReleasePolicy(expires="2999-01-01T00:00:00+00:00", platforms=("simulated",))


def rows() -> Iterator[Row]:
    """Opening (chunk by chunk, and into memory), sealing, and the memory that either needs at two
    sizes.
    """
    with tempfile.TemporaryDirectory(prefix="fedark-bench-") as name:
        folder = Path(name)
        model = _model(folder / "model", _SIZE)
        provider = SigningKey()
        manifest, key = seal(
            model, folder / "bundle", provider=provider, card=_CARD, policy=_POLICY
        )
        bundle = SealedBundle.load(folder / "bundle", provider.public)
        bundle.check_payload()  # reads the payload into the page cache, where both sides find it

        cipher = key.cipher(manifest.bundle_id, manifest.chunk_size, manifest.commitment)
        scratch = memoryview(bytearray(CHUNK))
        ours, peer = interleaved(
            lambda: _open(bundle, key),
            lambda: _plain_pass(bundle, cipher, scratch),
            runs=15,
            warmup=2,
        )
        yield _speed("open, plaintext handed on by the chunk", ours, peer)
        ours, peer = interleaved(
            lambda: open_to_memory(manifest, key, bundle.payload()),
            lambda: _plain_pass(bundle, cipher, memoryview(bytearray(manifest.total))),
            runs=5,
        )
        yield _speed("open into memory", ours, peer)

        start = time.perf_counter()
        seal(model, folder / "again", provider=provider, card=_CARD, policy=_POLICY)
        yield Row(
            "seal, digests and fsync included",
            _SIZE / (time.perf_counter() - start) / 1e9,
            None,
            "GB/s",
        )

        for action in ("seal", "open"):
            large, small = (_growth(action, folder, size) for size in (_LARGE, _SMALL))
            yield Row(
                f"{action}: memory growth at {_LARGE // _MIB} MiB, against {_SMALL // _MIB} MiB",
                large,
                small,
                "MiB",
                large / small,
                "<= 8 MiB more",
                large - small <= 8,
            )


def _speed(case: str, ours: float, peer: float) -> Row:
    return Row(
        case,
        _SIZE / ours / 1e9,
        _SIZE / peer / 1e9,
        "GB/s",
        peer / ours,
        ">= 0.60",
        peer / ours >= 0.60,
    )


def _model(folder: Path, size: int) -> Path:
    folder.mkdir()
    block = np.frombuffer(secrets.token_bytes(_MIB), dtype=np.uint8)
    save_file({"weight": np.tile(block, size // _MIB)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def _open(bundle: SealedBundle, key: WeightKey) -> None:
    opener = Opener(bundle.manifest, key, lambda _name, _part: None)
    for piece in bundle.payload():
        opener.feed(piece)
    opener.finish()


def _plain_pass(bundle: SealedBundle, cipher: AESGCM, plain: memoryview) -> None:
    """Read and decrypt; `plain` holds one chunk, or all of them."""
    manifest, sealed = bundle.manifest, memoryview(bytearray(CHUNK + TAG_BYTES))
    step = CHUNK if len(plain) > CHUNK else 0
    with open(bundle.path / "payload", "rb", buffering=0) as file:
        for index in range(manifest.chunks):
            count = file.readinto(sealed)
            target = plain[index * step :][: count - TAG_BYTES]
            data = associated_data(manifest.bundle_id, index, index == manifest.chunks - 1)
            cipher.decrypt_into(nonce(index), sealed[:count], data, target)


def _growth(action: str, folder: Path, size: int) -> float:
    """MiB by which the peak resident set of a process grows when it seals or opens a model of
    `size` bytes.
    """
    work = Path(tempfile.mkdtemp(prefix=f"{action}-", dir=folder))
    model, provider = _model(work / "model", size), SigningKey()
    arguments = [action, str(work)]
    if action == "open":
        manifest, key = seal(model, work / "bundle", provider=provider, card=_CARD, policy=_POLICY)
        KeyStore(work / "keys").put(manifest, key)
        arguments.append(provider.public.hex())
    child = [sys.executable, "-m", "fedark.bench.seal", *arguments]
    result = subprocess.run(child, capture_output=True, check=True, text=True)  # nosec B603
    shutil.rmtree(work)
    return float(result.stdout)


def _measured(action: str, work: Path, provider: str) -> float:
    if action == "seal":
        run: Callable[[], object] = lambda: seal(  # noqa: E731
            work / "model", work / "out", provider=SigningKey(), card=_CARD, policy=_POLICY
        )
    else:
        bundle = SealedBundle.load(work / "bundle", bytes.fromhex(provider))
        key = KeyStore(work / "keys").get(bundle.manifest)
        run = lambda: open_directory(bundle, key, work / "out")  # noqa: E731
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # sets the peak back to what is resident now
    before = _peak()
    run()
    return (_peak() - before) / 1024


def _peak() -> int:
    """VmHWM of this process in KiB (proc_pid_status(5)); ru_maxrss would inherit the parent's over
    exec.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    print(_measured(sys.argv[1], Path(sys.argv[2]), "".join(sys.argv[3:])))
