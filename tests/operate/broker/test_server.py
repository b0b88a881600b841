"""The transport: TLS or nothing, a deadline always, bounded sizes and numbers, health, no
reflection, and no secret in errors.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedark.foundation.errors import (
    EvidenceRefused,
    FederationError,
    InputError,
    LogRefused,
    ReleaseRefused,
    StorageError,
)
from fedark.operate.broker import server as server_module
from fedark.operate.broker.client import BrokerClient
from fedark.operate.broker.server import (
    FAULT,
    MAX_MESSAGE,
    SERVICE,
    BrokerServer,
    fault_of,
    status_of,
)
from fedark.v1 import broker_pb2_grpc
from fedark.vault.weightkey import WeightKey


def channel(world: Any, server: BrokerServer, **options: Any) -> Any:
    credentials = grpc.ssl_channel_credentials(world.certificate.read_bytes())
    return world.stack.enter_context(
        grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, **options)
    )


def status(call: Callable[[], Any]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    code: grpc.StatusCode = caught.value.code()  # type: ignore[attr-defined]
    return code


# -- TLS


def test_a_plaintext_client_is_refused(world: Any) -> None:
    server = world.serve()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as plain:
        stub = broker_pb2_grpc.BrokerStub(plain)
        assert (
            status(lambda: stub.Challenge(world.ask(), timeout=60)) is grpc.StatusCode.UNAVAILABLE
        )
        health = health_pb2_grpc.HealthStub(plain)
        assert (
            status(lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=60))
            is grpc.StatusCode.UNAVAILABLE
        )


def test_a_broker_with_another_certificate_than_the_caller_trusts_is_not_talked_to(
    world: Any, certify: Callable[[], tuple[Path, Path]]
) -> None:
    other, _ = certify()
    client = world.stack.enter_context(
        BrokerClient(f"127.0.0.1:{world.serve().port}", roots=other.read_bytes(), timeout=60)
    )
    with pytest.raises(FederationError, match="not who its certificate should say"):
        client.challenge(world.ask())


def test_a_private_key_that_others_can_read_is_not_used(
    world: Any, certify: Callable[[], tuple[Path, Path]]
) -> None:
    certificate, key = certify()
    key.chmod(0o640)
    with pytest.raises(InputError, match="open to other users"):
        BrokerServer(world.broker(), listen="127.0.0.1:0", certificate=certificate, key=key)
    link = key.with_name("link")
    link.symlink_to(world.key)
    with pytest.raises(InputError, match="cannot be read"):
        BrokerServer(world.broker(), listen="127.0.0.1:0", certificate=certificate, key=link)


def test_a_key_that_is_not_the_certificates_is_not_served_with(
    world: Any, certify: Callable[[], tuple[Path, Path]]
) -> None:
    _, key = certify()
    with pytest.raises(FederationError, match="cannot listen"):
        BrokerServer(world.broker(), listen="127.0.0.1:0", certificate=world.certificate, key=key)


def test_an_address_in_use_is_told(world: Any) -> None:
    port = world.serve().port
    with pytest.raises(FederationError, match="cannot listen"):
        BrokerServer(
            world.broker(), listen=f"127.0.0.1:{port}", certificate=world.certificate, key=world.key
        )


# -- limits


def test_an_oversized_request_is_refused(world: Any) -> None:
    server = world.serve()
    stub = broker_pb2_grpc.BrokerStub(channel(world, server))
    request = world.claim(b"e" * (MAX_MESSAGE + 1))
    assert status(lambda: stub.Release(request, timeout=30)) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert world.client(server).challenge(world.ask()).nonce


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_call_without_a_near_deadline_is_refused(world: Any, timeout: int | None) -> None:
    stub = broker_pb2_grpc.BrokerStub(channel(world, world.serve()))
    assert (
        status(lambda: stub.Challenge(world.ask(), timeout=timeout))
        is grpc.StatusCode.INVALID_ARGUMENT
    )
    assert (
        status(lambda: stub.Release(world.claim(b""), timeout=timeout))
        is grpc.StatusCode.INVALID_ARGUMENT
    )


def test_nothing_is_released_to_a_caller_whose_deadline_has_passed(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = world.broker()
    server = world.serve(broker)
    evidence = world.evidence(world.trainer(), world.client(server).challenge(world.ask()).nonce)
    admit, gone, ended = broker._admit, threading.Event(), threading.Event()

    def slow(*args: Any, **named: Any) -> Any:
        peer = admit(*args, **named)
        assert gone.wait(60)
        return peer

    monkeypatch.setattr(broker, "_admit", slow)
    monkeypatch.setattr(broker, "tell", lambda party, error: ended.set())
    with pytest.raises(FederationError, match="did not answer within 5 s"):
        world.client(server, timeout=5).release(world.claim(evidence))
    gone.set()
    assert ended.wait(60)
    assert [kind for kind, _ in world.entries()] == ["attestation", "refusal"]


def test_calls_beyond_the_limit_are_refused_and_not_queued(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = world.broker()
    server = world.serve(broker, concurrent=2)
    client = world.client(server)
    go, inside, challenge = threading.Event(), threading.Semaphore(0), broker.challenge

    def slow(request: Any) -> Any:
        inside.release()
        assert go.wait(60)
        return challenge(request)

    monkeypatch.setattr(broker, "challenge", slow)
    answers: list[Any] = []
    callers = [
        threading.Thread(target=lambda: answers.append(client.challenge(world.ask())))
        for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    try:
        assert all(inside.acquire(timeout=30) for _ in callers)
        with pytest.raises(FederationError, match="busy"):
            client.challenge(world.ask())
    finally:
        go.set()
        for caller in callers:
            caller.join(30)
    assert len(answers) == 2


# -- health, reflection


def test_health_answers(world: Any) -> None:
    server = world.serve()
    assert world.client(server).serving()
    stub = health_pb2_grpc.HealthStub(channel(world, server))
    assert (
        stub.Check(health_pb2.HealthCheckRequest(), timeout=60).status
        == health_pb2.HealthCheckResponse.SERVING
    )
    unknown = health_pb2.HealthCheckRequest(service="fedark.v1.Node")
    assert status(lambda: stub.Check(unknown, timeout=60)) is grpc.StatusCode.NOT_FOUND


def test_a_health_watch_that_would_hold_a_call_open_is_not_offered(world: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel(world, world.serve()))
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    assert status(lambda: list(stub.Watch(request, timeout=60))) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_is_off(world: Any, version: str) -> None:
    method = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call = channel(world, world.serve()).stream_stream(method)
    assert status(lambda: list(call(iter([b""]), timeout=60))) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    "method", ["/fedark.v1.Broker/Weights", "/fedark.v1.Node/Status", "/fedark.v1.Node/Handle"]
)
def test_no_other_method_is_served(world: Any, method: str) -> None:
    call = channel(world, world.serve()).unary_unary(method)
    assert status(lambda: call(b"", timeout=60)) is grpc.StatusCode.UNIMPLEMENTED


def test_bytes_that_are_no_request_are_refused(world: Any) -> None:
    server = world.serve()
    call = channel(world, server).unary_unary("/fedark.v1.Broker/Release")
    for data in (b"\xff" * 100, os.urandom(1000), b"\x0a\xff\xff\xff\xff\x0f"):
        assert status(lambda data=data: call(data, timeout=60)) in (  # type: ignore[misc]
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.PERMISSION_DENIED,
        )
    assert world.client(server).serving()


# -- errors


def test_a_refusal_is_a_status_with_the_errors_texts(world: Any) -> None:
    stub = broker_pb2_grpc.BrokerStub(channel(world, world.serve()))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Release(world.claim(b"nonsense"), timeout=60)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "Evidence of the trainer of north was refused" in error.details()
    assert FAULT in {key for key, _ in error.trailing_metadata()}


@pytest.mark.parametrize(
    "error",
    [
        ValueError("secret 5f5f"),
        StorageError(
            "The log /home/provider/log.sqlite cannot be written.", fix="See /home/provider."
        ),
        LogRefused("The log /home/provider/log.sqlite was altered."),
    ],
)
def test_what_went_wrong_inside_the_node_is_not_told_to_callers(
    world: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    broker = world.broker()
    told: list[str] = []
    monkeypatch.setitem(broker.settings.__dict__, "on_progress", told.append)

    def fail(*args: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(broker, "_admit", fail)
    client = world.client(world.serve(broker))
    with pytest.raises(FederationError) as caught:
        client.release(world.claim(b"evidence"))
    assert caught.value.what == "The provider's node cannot answer now."
    assert not any(word in str(caught.value) for word in ("secret", "home", "sqlite"))
    assert len(told) == 1
    assert "secret" not in told[0]


def test_no_answer_of_the_broker_holds_a_weight_key(world: Any) -> None:
    broker = world.broker()
    client, trainer = world.client(world.serve(broker)), world.trainer()
    secrets = [
        bytes(key._secret) for key in broker._weight_keys.values() if isinstance(key, WeightKey)
    ]
    grants = client.release(
        world.claim(world.evidence(trainer, client.challenge(world.ask()).nonce))
    )
    assert secrets
    assert not any(secret in grants.SerializeToString() for secret in secrets)


def test_a_fault_with_many_long_reasons_fits_into_a_trailer() -> None:
    error = EvidenceRefused("x" * 5000, ["r" * 5000] * 100)
    assert len(fault_of(error).SerializeToString()) < 5000
    assert status_of(error) is status_of(ReleaseRefused("no")) is grpc.StatusCode.PERMISSION_DENIED


# -- the command


def run_broker(world: Any) -> tuple[subprocess.Popen[str], int]:
    options = [
        "--party",
        world.provider,
        "--listen",
        "127.0.0.1:0",
        "--cert",
        world.certificate,
        "--key",
        world.key,
    ]
    command = "from fedark.cli.broker import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "serve", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(server_module.__file__).parents[2],
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "key broker of maker listens on 127.0.0.1:" in line, line + process.stdout.read()
    return process, int(line.rsplit(":", 1)[1])


@pytest.mark.slow
def test_a_broker_that_was_killed_and_started_again_keeps_its_nonces_and_its_log(
    world: Any,
) -> None:
    trainer = world.trainer()
    process, port = run_broker(world)
    try:
        client = world.client(port)
        used, unused = (
            world.evidence(trainer, client.challenge(world.ask()).nonce) for _ in range(2)
        )
        assert client.release(world.claim(used)).by_model
    finally:
        process.kill()
        process.wait()
    process, port = run_broker(world)
    try:
        client = world.client(port)
        with pytest.raises(EvidenceRefused, match="this is a replay"):
            client.release(world.claim(used))
        assert client.release(world.claim(unused)).by_model
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert "refused, asked directly by north" in output
    assert [kind for kind, _ in world.entries()] == [
        "attestation",
        "release",
        "attestation",
        "release",
    ]
