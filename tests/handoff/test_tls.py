"""Temporal behind TLS, as on Temporal Cloud: who is at the other end is checked, and we show a certificate or a key."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificate_authority import Authority, authority, tls_in_front_of
from tests.support.handoff import HandOff
from tests.support.stack import Stack
from tests.support.waiting import until


@pytest.fixture(scope="module")
def issuer(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with authority(stack, tmp_path_factory.mktemp("tls")) as made:
        yield made


@pytest.fixture(scope="module")
def port(handoff: HandOff, issuer: Authority) -> Iterator[int]:
    """It asks clients for a certificate."""
    context = issuer.server("temporal.example")
    context.set_alpn_protocols(["h2"])
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(issuer.ca)
    host, _, plain = handoff.temporal.address.partition(":")
    with tls_in_front_of((host, int(plain)), context) as port:
        yield port


def settings(issuer: Authority, port: int) -> dict[str, str | Path]:
    certificate, key = issuer.issue("runs.example")
    return {
        "TEMPORAL_ADDRESS": f"127.0.0.1:{port}",
        "TEMPORAL_API_KEY": "temporal-api-key-canary",
        "TEMPORAL_TLS_SERVER_CA_CERT_PATH": issuer.ca,
        "TEMPORAL_TLS_SERVER_NAME": "temporal.example",
        "TEMPORAL_TLS_CLIENT_CERT_PATH": certificate,
        "TEMPORAL_TLS_CLIENT_KEY_PATH": key,
    }


def test_a_worker_connects_with_a_certificate_and_a_key(handoff: HandOff, issuer: Authority, port: int) -> None:
    worker = handoff.worker(**settings(issuer, port))
    until(lambda: "worker_started" in worker.log.read_text(), 30, what="the worker's start")
    assert "canary" not in worker.log.read_text()
    worker.stop()


@pytest.mark.parametrize(
    "changed",
    [
        {"TEMPORAL_TLS_SERVER_NAME": "other.example"},
        {"TEMPORAL_TLS_SERVER_CA_CERT_PATH": ""},
        {"TEMPORAL_TLS_CLIENT_CERT_PATH": "", "TEMPORAL_TLS_CLIENT_KEY_PATH": ""},
        {"TEMPORAL_TLS": "false", "TEMPORAL_API_KEY": ""},
    ],
    ids=["another name", "another authority", "no certificate", "no TLS"],
)
def test_a_worker_does_not_connect_otherwise(
    handoff: HandOff, issuer: Authority, port: int, changed: dict[str, str]
) -> None:
    worker = handoff.worker(**(settings(issuer, port) | changed))
    until(lambda: worker.log.read_text().count("temporal_unreachable") > 1, 30, what="the failure, and the next try")
    assert "worker_started" not in worker.log.read_text()
    worker.stop()
