"""configfs-tsm: the attesters of SEV-SNP and TDX against a folder that behaves as the kernel's
does, and as it must not.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import uuid

import pytest

from fedark.attestation.platforms._tsm import TsmFiles, TsmReport, tsm_report
from fedark.attestation.platforms.base import Attester
from fedark.attestation.platforms.sev_snp import SevSnpAttester
from fedark.attestation.platforms.sev_snp_report import REPORT_BYTES
from fedark.attestation.platforms.tdx import TdxAttester
from fedark.foundation.errors import EnclaveFailed, EvidenceRefused

DATA = bytes(range(64))


class FakeKernel(TsmFiles):
    """Real files in a real folder; writes are counted and reports are made as in
    drivers/virt/coco/tsm.

    `interfere` is called before each read of outblob with the entry: it plays the other process.
    """

    def __init__(
        self,
        provider="sev_guest",
        make_report=lambda data, privilege: b"report:" + data,
        auxblob=None,
    ):
        self.provider = provider
        self.make_report = make_report
        self.auxblob = auxblob
        self.interfere = lambda entry: None
        self.busy = 0
        self.made = []

    def make(self, entry):
        super().make(entry)
        self.made.append(entry)
        (entry / "provider").write_text(f"{self.provider}\n")
        (entry / "generation").write_text("0\n")
        for name in ("inblob", "privlevel", "outblob"):
            (entry / name).write_bytes(b"")
        if self.auxblob is not None:
            (entry / "auxblob").write_bytes(self.auxblob)

    def remove(self, entry):
        shutil.rmtree(entry)  # configfs removes the attributes with their directory

    def write(self, attribute, data):
        super().write(attribute, data)
        counter = attribute.parent / "generation"
        counter.write_text(f"{int(counter.read_text()) + 1}\n")

    def read(self, attribute):
        if attribute.name == "outblob":
            self.interfere(attribute.parent)
            if self.busy:
                self.busy -= 1
                raise OSError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
            privilege = (attribute.parent / "privlevel").read_bytes()
            attribute.write_bytes(
                self.make_report((attribute.parent / "inblob").read_bytes(), privilege)
            )
        return super().read(attribute)


def test_a_report_is_over_our_data_and_its_folder_is_removed(tmp_path):
    kernel = FakeKernel(auxblob=b"certificates")
    answer = tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert answer == TsmReport(b"report:" + DATA, b"certificates")
    assert list(tmp_path.iterdir()) == []


def test_a_provider_without_extra_data_gives_none(tmp_path):
    assert (
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=FakeKernel()).auxblob == b""
    )


def test_the_privilege_level_is_written_and_counted(tmp_path):
    kernel = FakeKernel(make_report=lambda data, privilege: privilege)
    assert (
        tsm_report(DATA, provider="sev_guest", privilege=2, folder=tmp_path, files=kernel).outblob
        == b"2"
    )


def test_a_report_over_another_processs_data_is_never_taken(tmp_path):
    kernel = FakeKernel()
    intrusions = iter([True, True, False])

    def interfere(entry):
        if next(intrusions):
            kernel.write(entry / "inblob", b"\xee" * 64)

    kernel.interfere = interfere
    answer = tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert answer.outblob == b"report:" + DATA
    assert len(set(kernel.made)) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_write_of_the_same_data_by_another_process_still_counts_as_interference(tmp_path):
    kernel = FakeKernel()
    intrusions = iter([True, False])
    kernel.interfere = lambda entry: (
        kernel.write(entry / "inblob", DATA) if next(intrusions) else None
    )
    tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert len(kernel.made) == 2


def test_endless_interference_ends_with_an_error_and_nothing_left_behind(tmp_path):
    kernel = FakeKernel()
    kernel.interfere = lambda entry: kernel.write(entry / "inblob", b"\xee" * 64)
    with pytest.raises(EnclaveFailed, match="kept writing"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert len(kernel.made) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_conflict_that_the_kernel_saw_is_tried_again(tmp_path):
    kernel = FakeKernel()
    kernel.busy = 1
    assert (
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel).outblob
        == b"report:" + DATA
    )
    assert len(kernel.made) == 2


def test_another_provider_is_refused_before_anything_is_asked(tmp_path):
    kernel = FakeKernel(provider="tdx_guest")
    with pytest.raises(EnclaveFailed, match="provider is 'tdx_guest'"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert list(tmp_path.iterdir()) == []


def test_a_machine_without_configfs_tsm_is_told_what_it_takes(tmp_path):
    with pytest.raises(EnclaveFailed, match=r"Linux 6\.7 with configfs"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path / "missing")


def test_the_kernels_own_error_ends_the_request_and_leaves_nothing_behind(tmp_path):
    kernel = FakeKernel()

    def fail(entry):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    kernel.interfere = fail
    with pytest.raises(EnclaveFailed, match="File too large"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)
    assert list(tmp_path.iterdir()) == []


def test_a_report_beyond_all_sizes_is_refused(tmp_path):
    kernel = FakeKernel(make_report=lambda data, privilege: bytes(2 << 20))
    with pytest.raises(EnclaveFailed, match="File too large"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)


def test_a_generation_that_is_no_number_is_refused(tmp_path):
    kernel = FakeKernel()
    kernel.interfere = lambda entry: (entry / "generation").write_text("many\n")
    with pytest.raises(EnclaveFailed, match="not a number"):
        tsm_report(DATA, provider="sev_guest", folder=tmp_path, files=kernel)


@pytest.mark.parametrize("size", [0, 63, 65])
def test_report_data_of_another_size_is_refused(tmp_path, size):
    with pytest.raises(EnclaveFailed, match="not 64"):
        tsm_report(bytes(size), provider="sev_guest", folder=tmp_path, files=FakeKernel())


def snp_report(data, privilege):
    return bytes(0x50) + data + bytes(REPORT_BYTES - 0x90)


def test_the_snp_attester_puts_the_hosts_certificates_behind_the_report(tmp_path):
    guid = uuid.UUID("63da758d-e664-4564-adc5-f4b93be8accd").bytes
    table = guid + struct.pack("<II", 48, 4) + bytes(24) + b"vcek" + bytes(4000)
    attester: Attester = SevSnpAttester(
        folder=tmp_path, files=FakeKernel(make_report=snp_report, auxblob=table)
    )
    assert attester.quote(DATA, bytes(32)) == snp_report(DATA, b"") + b"vcek"


def test_the_snp_attester_refuses_a_report_over_other_data(tmp_path):
    kernel = FakeKernel(make_report=lambda data, privilege: snp_report(bytes(64), privilege))
    with pytest.raises(EnclaveFailed, match="not over our report data"):
        SevSnpAttester(folder=tmp_path, files=kernel).quote(DATA, bytes(32))


def test_the_tdx_attester_refuses_what_is_no_quote(tmp_path):
    kernel = FakeKernel(
        provider="tdx_guest", make_report=lambda data, privilege: b"\x04\x00" + bytes(5000)
    )
    with pytest.raises(EvidenceRefused):
        TdxAttester(folder=tmp_path, files=kernel).quote(DATA, bytes(32))


def test_the_tdx_attester_needs_a_tdx_guest(tmp_path):
    with pytest.raises(EnclaveFailed, match="not 'tdx_guest'"):
        TdxAttester(folder=tmp_path, files=FakeKernel()).quote(DATA, bytes(32))
