"""Attestation reports through the kernel's configfs-tsm (Linux 6.7;
Documentation/ABI/testing/configfs-tsm-report).

One directory below the report folder is one request: report data goes into `inblob`, the report
comes out of `outblob`. The kernel counts every write in `generation`. A report is taken only if the
count says that nobody else wrote between our write and our read, so that it is never over another
process's data; after a conflict it starts again in a directory of its own.
"""

from __future__ import annotations

import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from fedark.foundation.errors import EnclaveFailed

__all__ = ["REPORT_FOLDER", "TsmFiles", "TsmReport", "tsm_report"]

REPORT_FOLDER = Path("/sys/kernel/config/tsm/report")
_ATTEMPTS = 5
_MAX_BLOB = 1 << 20
_SAFE = "No evidence left the enclave."


@dataclass(frozen=True)
class TsmReport:
    """What the kernel gave: the report, and whatever certificates the host put beside it (empty if
    none).
    """

    outblob: bytes
    auxblob: bytes


class TsmFiles:
    """The four file operations that configfs takes, as the kernel offers them. Removing a directory
    removes its attributes.
    """

    def make(self, entry: Path) -> None:
        os.mkdir(entry, 0o700)

    def remove(self, entry: Path) -> None:
        os.rmdir(entry)

    def read(self, attribute: Path) -> bytes:
        descriptor = os.open(attribute, os.O_RDONLY | os.O_CLOEXEC)
        try:
            parts = []
            size = 0
            while part := os.read(descriptor, 1 << 16):
                parts.append(part)
                size += len(part)
                if size > _MAX_BLOB:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return b"".join(parts)
        finally:
            os.close(descriptor)

    def write(self, attribute: Path, data: bytes) -> None:
        # One write call: configfs commits a binary attribute when the file is closed.
        descriptor = os.open(attribute, os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            os.close(descriptor)


class _ConflictError(Exception):
    """Somebody else wrote into our request."""


def tsm_report(
    report_data: bytes,
    *,
    provider: str,
    privilege: int | None = None,
    folder: Path = REPORT_FOLDER,
    files: TsmFiles | None = None,
) -> TsmReport:
    """A report of `provider` ("sev_guest", "tdx_guest") over 64 bytes of report data.

    Args:
        privilege: SNP's VMPL to report from; None leaves the kernel's own choice.

    Raises:
        EnclaveFailed: this machine has no such provider, the kernel refused, or others kept
            interfering.
    """
    if len(report_data) != 64:
        raise EnclaveFailed(f"Report data has {len(report_data)} bytes, not 64.", safe=_SAFE)
    files = files or TsmFiles()
    for _ in range(_ATTEMPTS):
        entry = folder / f"fedark-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            files.make(entry)
            try:
                return _request(files, entry, report_data, provider, privilege)
            finally:
                files.remove(entry)
        except _ConflictError:
            continue
        except OSError as error:
            raise EnclaveFailed(
                f"The kernel made no attestation report in {folder}: {error.strerror}.",
                safe=_SAFE,
                fix=(
                    f"It takes Linux 6.7 with configfs mounted and the {provider} driver, in a"
                    " guest of that platform, as root."
                ),
            ) from None
    raise EnclaveFailed(
        f"Another process kept writing into our attestation requests ({_ATTEMPTS} attempts).",
        safe=_SAFE,
        fix=f"Let one process alone write below {folder}.",
    )


def _request(
    files: TsmFiles, entry: Path, report_data: bytes, provider: str, privilege: int | None
) -> TsmReport:
    found = files.read(entry / "provider").strip().decode("ascii", "replace")
    if found != provider:
        raise EnclaveFailed(
            f"This machine's attestation provider is {found!r:.40}, not {provider!r}.",
            safe=_SAFE,
            fix="Choose the platform that the machine has.",
        )
    expected = _generation(files, entry)
    writes = (
        [("inblob", report_data)]
        if privilege is None
        else [("privlevel", b"%d" % privilege), ("inblob", report_data)]
    )
    for name, data in writes:
        files.write(entry / name, data)
    expected += len(writes)
    try:
        outblob = files.read(entry / "outblob")
        try:
            auxblob = files.read(entry / "auxblob")
        except FileNotFoundError:  # the provider has none
            auxblob = b""
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EBUSY):  # the kernel saw the conflict itself
            raise _ConflictError from None
        raise
    if _generation(files, entry) != expected:
        raise _ConflictError
    return TsmReport(outblob, auxblob)


def _generation(files: TsmFiles, entry: Path) -> int:
    text = files.read(entry / "generation").strip()
    if not text.isdigit() or len(text) > 20:
        raise EnclaveFailed("The kernel's report generation is not a number.", safe=_SAFE)
    return int(text)
