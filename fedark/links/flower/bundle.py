"""The constant app bundle (FAB): it names two components of the installed fedark package and holds
no code.

Flower's nodes run whatever bundle the SuperLink sends. Ours run one: `require_pinned` compares the
bundle's bytes with a hash that is part of the installed package, before anything of the bundle is
unpacked, parsed or loaded. What a node runs is therefore what its operator installed, whoever runs
the SuperLink.

The bundle is a stored (uncompressed) zip with fixed dates, so its bytes are the same on every
machine.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

from fedark.foundation.errors import Refused

__all__ = ["PINNED_SHA256", "SOCKET_KEY", "build", "require_pinned"]

PINNED_SHA256 = "c779cf4ac20f146d61fee4bbdcced0b8bb1013cab73bc39d486ab413aadecbbe"
SOCKET_KEY = "fedark-socket"  # in a node's own configuration: where its daemon serves

_DATE = (2024, 10, 1, 0, 0, 0)
PYPROJECT = """\
[project]
name = "fedark-relay"
version = "1.0.0"
description = "Relays opaque fedark stages. Holds no code: its components are in the installed \
fedark package."
license = "Apache-2.0"
dependencies = [
    "flwr==1.42.0",
]

[tool.flwr.app]
publisher = "fedark"

[tool.flwr.app.components]
serverapp = "fedark.links.flower.server_app:app"
clientapp = "fedark.links.flower.client_app:app"
"""


def build() -> bytes:
    """The bundle's bytes; their SHA-256 is `PINNED_SHA256`."""
    project = PYPROJECT.encode()
    content = f"pyproject.toml,{hashlib.sha256(project).hexdigest()},{len(project) * 8}".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("pyproject.toml", project), (".info/CONTENT", content)):
            archive.writestr(zipfile.ZipInfo(name, _DATE), data)
    return require_pinned(buffer.getvalue())


def require_pinned(content: bytes) -> bytes:
    """`content` if it is exactly the pinned bundle.

    Raises:
        Refused: it is anything else.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != PINNED_SHA256:
        raise Refused(
            f"The aggregator sent an app bundle that is not fedark's (SHA-256 {found[:16]}...,"
            f" expected {PINNED_SHA256[:16]}...).",
            safe="Nothing of it was unpacked or run, and no message was passed to the node.",
            fix=(
                "Both sides need the same version of fedark; if they have it, the aggregator is not"
                " to be trusted."
            ),
        )
    return content
