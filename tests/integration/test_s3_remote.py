"""Versions sent to and fetched from a DVC remote on a real S3 server, with faults on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config
from services.fault_proxy import FaultProxy, fault_proxy
from services.s3_server import RCLONE, WITHOUT_RCLONE, s3_service
from services.tiny_repo import ROOT, dvc, fresh_clone, prepare, tiny_repo, tree, wait_for

from data.objects import MissingObject, SourceUnavailable
from data.remote import cache_folder, fetch_version, pull, push, remote_states
from data.store import materialise

pytestmark = pytest.mark.skipif(RCLONE is None, reason=WITHOUT_RCLONE)


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with the dataset `tiny`, not prepared yet."""
    return tiny_repo(tmp_path)


@pytest.fixture
def proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of an S3 server with the bucket `drone`."""
    (tmp_path / "served").mkdir()
    with s3_service(tmp_path / "served") as service, fault_proxy(int(service.url.rpartition(":")[2])) as proxy:
        for name, value in (service.environment | {"AWS_ENDPOINT_URL": proxy.url}).items():
            monkeypatch.setenv(name, value)
        client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        client.create_bucket(Bucket="drone")
        yield proxy


def test_a_killed_pull_shows_nothing_and_is_taken_up(repo: Path, proxy: FaultProxy) -> None:
    version = prepare(repo, *(f"picture{number}" for number in range(60)))
    before, listed = tree(repo), cache_folder(repo) / f"files/md5/{version[:2]}/{version[2:]}.dir"
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    push("tiny", repo)
    fresh_clone(repo)
    proxy.delay_s = 0.1
    pulling = f"from pathlib import Path; from data.remote import pull; pull('tiny', Path({str(repo)!r}))"
    with subprocess.Popen([sys.executable, "-c", pulling], cwd=ROOT) as process:
        deadline = time.monotonic() + 300
        while len(list(listed.parents[1].glob("*/*"))) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    num_fetched = len(list(listed.parents[1].glob("*/*")))
    assert 20 <= num_fetched < 60
    assert not listed.exists()
    assert not (repo / "data/processed/tiny").exists()
    proxy.delay_s = 0.0
    proxy.requests.clear()
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    fetched = sum("/files/md5/" in path and path[-4:] != ".dir" for _, path in proxy.requests.elements())
    assert fetched <= 63 - num_fetched, "what had arrived is not fetched again"


def test_a_server_that_dies_during_a_push_ends_it(
    repo: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC itself waits for ever; what arrived is taken up by the next push."""
    monkeypatch.setattr("data.versioning.WATCH_S", 2.0)
    prepare(repo, *(f"picture{number}" for number in range(60)))
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    proxy.delay_s = 0.2
    closing = threading.Thread(target=lambda: (wait_for(lambda: num_put(proxy) > 10), proxy.close()))
    closing.start()
    with pytest.raises(SourceUnavailable, match=rf"{proxy.url}: "):
        push("tiny", repo)
    closing.join()


def num_put(proxy: FaultProxy) -> int:
    return sum(count for (method, path), count in proxy.requests.items() if method == "PUT" and "/files/md5/" in path)


def no_secret(message: str) -> None:
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in message


def test_wrong_credentials_say_so_and_lose_nothing(
    repo: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    before = tree(repo)
    with monkeypatch.context() as wrong:
        wrong.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-secret")
        for command in (push, pull):
            with pytest.raises(SourceUnavailable, match=r"SignatureDoesNotMatch.*the credentials") as caught:
                command("tiny", repo)
            no_secret(str(caught.value))
        states, why = remote_states({"tiny": version}, repo)
        assert states == {"tiny": "the remote does not answer"}
        no_secret(why)
    assert tree(repo) == before
    assert remote_states({"tiny": version}, repo)[0] == {"tiny": "not in the remote"}
    assert push("tiny", repo) == version


def test_s3_with_failing_requests_and_a_server_that_goes(repo: Path, tmp_path: Path, proxy: FaultProxy) -> None:
    version = prepare(repo, *(f"picture{number}" for number in range(30)))
    before = tree(repo)
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    proxy.failing_share = 0.2
    assert push("tiny", repo) == version
    assert remote_states({"tiny": version}, repo) == ({"tiny": "in the remote"}, "")
    folder = materialise("tiny", version, source="s3://drone/dvc", root=tmp_path / "node")
    assert len(json.loads((folder / "annotations/train.json").read_bytes())["images"]) == 28
    fresh_clone(repo)
    assert pull("tiny", repo) == version
    assert tree(repo) == before
    proxy.is_skewed = True
    with pytest.raises(SourceUnavailable, match=rf"s3://drone/dvc: {proxy.url}: .*Set this machine's clock"):
        push("tiny", repo)
    proxy.close()
    with pytest.raises(SourceUnavailable, match=rf"{proxy.url}: Could not connect.*Check AWS_ENDPOINT_URL"):
        pull("tiny", repo)
    states, why = remote_states({"tiny": version}, repo)
    assert states == {"tiny": "the remote does not answer"}
    assert proxy.url in why
    assert tree(repo) == before


def test_what_the_server_lost_is_named_and_sent_again(repo: Path, proxy: FaultProxy) -> None:
    version = prepare(repo, "a", "b", "c")
    dvc(repo, "remote", "add", "--default", "storage", "s3://drone/dvc")
    dvc(repo, "remote", "modify", "storage", "endpointurl", proxy.url)
    push("tiny", repo)
    before, md5 = tree(repo), hashlib.md5(tree(repo)["images/a.png"]).hexdigest()
    client = boto3.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
    client.delete_object(Bucket="drone", Key=f"dvc/files/md5/{md5[:2]}/{md5[2:]}")
    shutil.move(repo / ".dvc/cache", repo / "kept")
    with pytest.raises(MissingObject, match=r"s3://drone/dvc/files/md5/.*: not in this source"):
        fetch_version(version, repo)
    shutil.rmtree(repo / ".dvc/cache")
    shutil.move(repo / "kept", repo / ".dvc/cache")
    assert push("tiny", repo) == version
    fresh_clone(repo)
    assert pull("tiny", repo) == version
    assert tree(repo) == before
