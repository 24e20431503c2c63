"""`python -m infra.bucket`: what it makes it finds right, what is missing or otherwise it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from services.conditional_s3 import LOCALBUCKET, WITHOUT_LOCALBUCKET, conditional_s3_service
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service
from unit.infra.remembering_s3 import Memory, remembering_s3

from infra.bucket import main

NAMES = ["tls", "conditional writes", "public access", "encryption", "versioning", "lifecycle", "policy", "ledger"]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Memory]]:
    """A server that knows no bucket."""
    with remembering_s3() as (url, knows):
        reach(monkeypatch, url)
        yield knows


@pytest.fixture(scope="module")
def created() -> dict[str, bytes]:
    """What `create` sends."""
    with remembering_s3() as (url, knows), pytest.MonkeyPatch.context() as patch:
        reach(patch, url)
        assert main(["create", "site"]) == 0
        return knows.documents


@pytest.fixture
def site(memory: type[Memory], created: dict[str, bytes]) -> dict[str, bytes]:
    """A bucket that is right, and may be changed."""
    memory.buckets.add("site")
    memory.documents.update(created)
    return memory.documents


def reach(patch: pytest.MonkeyPatch, url: str) -> None:
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ACCESS_KEY_ID", "speck")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """How each line stands, by its name."""
    lines = capsys.readouterr().out.splitlines()
    return {line[6:].partition(":")[0]: line[:6].strip() for line in lines}


def test_what_it_makes_it_finds_right(memory: type[Memory], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "site"]) == 1
    assert states(capsys) == {"tls": "WRONG", "bucket": "WRONG"}
    for _ in range(2):
        assert main(["create", "site"]) == 0
        assert states(capsys) == dict.fromkeys(NAMES, "ok") | {"tls": "WRONG"}
    assert not memory.objects
    assert b"SecureTransport" not in memory.documents["policy"], "would lock out everybody, for this server has no TLS"


@pytest.mark.parametrize(
    ("setting", "other", "wrong"),
    [
        ("versioning", b"<V><Status>Suspended</Status></V>", {"versioning"}),
        ("publicAccessBlock", b"<P><BlockPublicAcls>true</BlockPublicAcls></P>", {"public access"}),
        ("lifecycle", b"<L><Rule><ID>probes</ID><Status>Enabled</Status></Rule></L>", {"lifecycle"}),
        ("policy", b'{"Version": "2012-10-17", "Statement": []}', {"policy", "ledger"}),
        ("encryption", None, {"encryption"}),
        ("policy", None, {"policy", "ledger"}),
        ("lifecycle", None, {"lifecycle"}),
    ],
)  # fmt: skip
def test_what_is_otherwise_is_named(
    setting: str, other: bytes | None, wrong: set[str], site: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    site.pop(setting)
    if other is not None:
        site[setting] = other
    assert main(["check", "site"]) == 1
    assert {name for name, state in states(capsys).items() if state == "WRONG"} == wrong | {"tls"}


def test_statements_that_others_added_to_the_policy_do_not_matter(
    site: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    policy = json.loads(site["policy"])
    policy["Statement"].insert(0, {"Sid": "Audit", "Effect": "Allow", "Principal": "*", "Action": "s3:GetObject"})
    # As Amazon S3 tells it.
    policy["Statement"][1] |= {"Principal": {"AWS": "*"}, "Resource": [policy["Statement"][1]["Resource"]]}
    site["policy"] = json.dumps(policy).encode()
    main(["check", "site"])
    assert states(capsys)["policy"] == "ok"


def test_the_policy_of_a_role_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "ray", "site"]) == 0
    assert "arn:aws:s3:::site/runs/*" in capsys.readouterr().out


def test_a_server_that_is_away_is_said(
    memory: type[Memory], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:canary@127.0.0.1:9")
    assert main(["check", "site"]) == 2
    told = "".join(capsys.readouterr())
    assert "AWS_ENDPOINT_URL" in told
    assert "canary" not in told


@contextmanager
def served(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    folder.mkdir()
    with (conditional_s3_service if kind == "localbucket" else s3_service)(folder) as service:
        yield service.environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "conditional", "unanswered"),
    [
        # Of the two neither keeps policies, encryption or rules.
        pytest.param(
            "localbucket", 0, "ok", {"public access", "encryption", "versioning", "lifecycle", "policy"},
            marks=pytest.mark.skipif(LOCALBUCKET is None, reason=WITHOUT_LOCALBUCKET),
        ),
        pytest.param(
            "rclone", 1, "WRONG", {"encryption", "lifecycle", "policy"},
            marks=pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE),
        ),
    ],
)  # fmt: skip
def test_real_servers(
    kind: str, code: int, conditional: str, unanswered: set[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with served(kind, tmp_path / "s3") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert main(["create", "site"]) == code
        found = states(capsys)
        assert found["conditional writes"] == conditional
        assert {name for name, state in found.items() if state == "?"} == unanswered
        assert found["ledger"] == "WRONG"
        assert main(["check", "site"]) == 1
