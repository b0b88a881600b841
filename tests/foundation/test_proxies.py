"""Which connections may use a proxy, and whose."""

from __future__ import annotations

import os

import pytest

from fedark.foundation.errors import InputError
from fedark.foundation.proxies import direct, is_loopback, proxy_for, through, without_proxies


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("pool.example", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
    ],
)
def test_loopback_is_known_by_name_and_address(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_proxy_is_named_or_the_environments_and_never_one_to_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    assert proxy_for("pool.example") == ""
    assert proxy_for("pool.example", "http://own:1") == "http://own:1"
    monkeypatch.setenv("HTTPS_PROXY", "http://site:2")
    assert proxy_for("pool.example") == "http://site:2"
    assert proxy_for("pool.example", "http://own:1") == "http://own:1"
    assert proxy_for("127.0.0.1", "http://own:1") == ""
    monkeypatch.setenv("no_proxy", "other.example, pool.example,fe80::1,10.0.0.0")
    assert proxy_for("pool.example") == ""
    assert proxy_for("pool.example", "http://own:1") == "http://own:1"
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("HTTPS_PROXY", "socks5://site:2")
    with pytest.raises(InputError, match=r"party\.toml"):
        proxy_for("pool.example")


@pytest.mark.usefixtures("dead_proxy")
def test_a_child_and_a_client_can_be_made_without_the_environments_proxies() -> None:
    before = dict(os.environ)
    with direct():
        assert os.environ == without_proxies(before)
        assert not [name for name in os.environ if name.lower().endswith("_proxy")]
    assert dict(os.environ) == before
    assert through("") == {}
    assert through("http://own:1")["https_proxy"] == "http://own:1"
