"""`python -m infra.bucket create|check BUCKET` and `policy ROLE BUCKET`: the S3 bucket of a deployment.

Endpoint, region and credentials come from boto3's environment variables: those of an administrator, not of a worker.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.bucket_policy import ENCRYPTION, NOT_PUBLIC, PROBES, PROMOTIONS, ROLES, RUNS, bucket_policy, lifecycle

OK, WRONG, UNANSWERED = "ok", "WRONG", "?"
# How servers say that they have no such call.
_NO_SUCH_CALL = {"NotImplemented", "MethodNotAllowed", "XNotImplemented", "UnsupportedOperation"}
# How Amazon S3 says that nothing was set.
_NOTHING_SET = {
    "NoSuchBucketPolicy",
    "NoSuchLifecycleConfiguration",
    "NoSuchPublicAccessBlockConfiguration",
    "ServerSideEncryptionConfigurationNotFoundError",
}
_REFUSED = {"AccessDenied", "Forbidden", "403"}
_TAKEN = "PreconditionFailed"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands (OK, WRONG, or UNANSWERED by this server), and what to do."""

    name: str
    state: str
    text: str

    def __str__(self) -> str:
        return f"{self.state:6}{self.name}: {self.text}"


class Bucket:
    """A bucket as its administrator sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.client = boto3.Session().client(
            "s3",
            # Path style: servers of one's own have no name for every bucket.
            config=Config(
                connect_timeout=10, read_timeout=30, retries={"total_max_attempts": 3, "mode": "standard"},
                s3={"addressing_style": "path"},
            ),
        )  # fmt: skip
        endpoint = urlsplit(self.client.meta.endpoint_url)
        self.endpoint = f"{endpoint.scheme}://{endpoint.netloc.rpartition('@')[2]}"
        self.is_tls = endpoint.scheme == "https"

    @property
    def policy(self) -> dict[str, Any]:
        """What its policy has to say. Without TLS, the statement that asks for it would lock everybody out."""
        return bucket_policy(self.name, tls=self.is_tls)

    def create(self) -> Iterator[Finding]:
        """Make it unless it is there, and set what it lacks. Setting the same again changes nothing."""
        region = self.client.meta.region_name
        place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
        try:
            self.client.create_bucket(Bucket=self.name, **place)
        except ClientError as error:
            if _code(error) not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                raise
            # Somebody else's is refused here.
            self.client.head_bucket(Bucket=self.name)
        settings: dict[str, Callable[[], object]] = {
            "public access": lambda: self.client.put_public_access_block(
                Bucket=self.name, PublicAccessBlockConfiguration=NOT_PUBLIC
            ),
            "encryption": lambda: self.client.put_bucket_encryption(
                Bucket=self.name, ServerSideEncryptionConfiguration=ENCRYPTION
            ),
            "versioning": lambda: self.client.put_bucket_versioning(
                Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}
            ),
            "lifecycle": lambda: self.client.put_bucket_lifecycle_configuration(
                Bucket=self.name, LifecycleConfiguration=lifecycle()
            ),
            "policy": lambda: self.client.put_bucket_policy(Bucket=self.name, Policy=json.dumps(self.policy)),
        }
        for name, apply in settings.items():
            try:
                apply()
            except ClientError as error:
                # What the server has no call for, the check says below.
                if not _has_no_such_call(error):
                    yield Finding(name, WRONG, f"not set, the server says {_code(error)}: {error}")

    def check(self) -> Iterator[Finding]:
        """Look at everything and change nothing but a probe below `runs/`, which is deleted."""
        again = f"Say `python -m infra.bucket create {self.name}`; where that changes nothing, this server keeps none"
        yield self._tls()
        try:
            self.client.head_bucket(Bucket=self.name)
        except ClientError as error:
            what = "there is none of this name" if _code(error) in {"404", "NoSuchBucket"} else _code(error)
            yield Finding(
                "bucket", WRONG, f"{what}. Say `python -m infra.bucket create {self.name}`, or {_CREDENTIALS}"
            )
            return
        yield self._conditional_writes()
        yield self._setting(
            "public access", "get_public_access_block",
            lambda answer: answer["PublicAccessBlockConfiguration"] == NOT_PUBLIC,
            "nothing in it can be made public", again,
        )  # fmt: skip
        yield self._setting(
            "encryption", "get_bucket_encryption", _is_encrypted, "what is written is encrypted at rest", again
        )
        yield self._setting(
            "versioning", "get_bucket_versioning", lambda answer: answer.get("Status") == "Enabled",
            "what is replaced or deleted stays for some days", again,
        )  # fmt: skip
        yield self._setting(
            "lifecycle", "get_bucket_lifecycle_configuration", _has_rules,
            "parts of uploads that nobody completed, former versions and probes go by themselves", again,
        )  # fmt: skip
        yield self._setting(
            "policy", "get_bucket_policy", self._has_policy, "denies what it has to, to everybody", again
        )
        yield self._ledger()

    def _tls(self) -> Finding:
        if self.is_tls:
            return Finding("tls", OK, self.endpoint)
        remedy = "fit for one machine's own network alone; elsewhere set AWS_ENDPOINT_URL to https"
        return Finding("tls", WRONG, f"{self.endpoint} carries secrets and data in the clear: {remedy}")

    def _conditional_writes(self) -> Finding:
        key = f"{RUNS}/.probes/{uuid.uuid4().hex}"
        probe = {"Bucket": self.name, "Key": key, "Body": b"probe", "IfNoneMatch": "*"}
        try:
            self.client.put_object(**probe)
            self.client.put_object(**probe)
        except ClientError as error:
            if _code(error) == _TAKEN:
                return Finding("conditional writes", OK, "an object that is there is not written again")
            return Finding("conditional writes", WRONG, f"{_code(error)} to a PUT of {key!r}; {_CREDENTIALS}")
        finally:
            with suppress(ClientError):
                self.client.delete_object(Bucket=self.name, Key=key)
        remedy = "Promotions will be refused: use a server that honours it, as Amazon S3 does"
        return Finding("conditional writes", WRONG, f"the server ignores `If-None-Match: *`. {remedy}")

    def _setting(
        self, name: str, call: str, is_right: Callable[[dict[str, Any]], bool], meaning: str, remedy: str
    ) -> Finding:
        try:
            answer = getattr(self.client, call)(Bucket=self.name)
        except ClientError as error:
            code = _code(error)
            if code in _NOTHING_SET:
                return Finding(name, WRONG, f"nothing is set. {remedy}")
            if _has_no_such_call(error):
                return Finding(
                    name, UNANSWERED, f"this server does not know ({code}). See its own manual for: {meaning}"
                )
            return Finding(name, WRONG, f"{code}. To look at it, {_CREDENTIALS}")
        try:
            if is_right(answer):
                return Finding(name, OK, meaning)
        except (KeyError, ValueError):
            # A server that does not know the question may answer another one.
            return Finding(name, UNANSWERED, f"this server's answer is none. See its own manual for: {meaning}")
        return Finding(name, WRONG, f"set otherwise, so not: {meaning}. {remedy}")

    def _has_policy(self, answer: dict[str, Any]) -> bool:
        # Others may have added to it.
        found = _as_set(json.loads(answer["Policy"]).get("Statement", []))
        return _as_set(self.policy["Statement"]) <= found

    def _ledger(self) -> Finding:
        """By doing it: neither deletes anything, for there is nothing under this name."""
        key = f"{PROBES}/{uuid.uuid4().hex}"
        try:
            self.client.delete_object(Bucket=self.name, Key=key)
        except ClientError as error:
            if _code(error) in _REFUSED:
                return Finding("ledger", OK, f"a DELETE below {PROMOTIONS}/ is refused, also to an administrator")
            return Finding("ledger", WRONG, f"{_code(error)} to a DELETE of {key!r}; {_CREDENTIALS}")
        remedy = "Where the server keeps no policies, restrict its keys by its own means"
        return Finding("ledger", WRONG, f"a DELETE below {PROMOTIONS}/ is not refused. {remedy}")


_CREDENTIALS = "check the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY): they must be an administrator's"


def _is_encrypted(answer: dict[str, Any]) -> bool:
    rules = answer["ServerSideEncryptionConfiguration"]["Rules"]
    return any("SSEAlgorithm" in rule.get("ApplyServerSideEncryptionByDefault", {}) for rule in rules)


def _has_rules(answer: dict[str, Any]) -> bool:
    # A server may tell more of a rule than it was told.
    found = {rule.get("ID"): rule for rule in answer["Rules"]}
    return all(wanted.items() <= found.get(wanted["ID"], {}).items() for wanted in lifecycle()["Rules"])


def _as_set(statements: list[dict[str, Any]]) -> set[str]:
    return {json.dumps({key: _plain(value) for key, value in each.items()}, sort_keys=True) for each in statements}


def _plain(value: Any) -> Any:
    """One string and a list of it are the same in a policy, as are `*` and `{"AWS": "*"}`; the order counts nowhere."""
    if value == {"AWS": "*"}:
        return ["*"]
    return sorted(value) if isinstance(value, list) else [value] if isinstance(value, str) else value


def _has_no_such_call(error: ClientError) -> bool:
    return _code(error) in _NO_SUCH_CALL or error.response["ResponseMetadata"]["HTTPStatusCode"] in {405, 501}


def _code(error: ClientError) -> str:
    code: str = error.response.get("Error", {}).get("Code", "")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all is right; after `create`, also if only what this server cannot do is wrong or unanswered."""
    parser = argparse.ArgumentParser(prog="python -m infra.bucket", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("create", "make and set up, then check"), ("check", "one line for each property")):
        commands.add_parser(name, help=what).add_argument("bucket")
    policy = commands.add_parser("policy", help="print the policy of a role, to attach to its user or service account")
    policy.add_argument("role", choices=sorted(ROLES))
    policy.add_argument("bucket")
    options = parser.parse_args(arguments)
    if options.command == "policy":
        print(json.dumps(ROLES[options.role](options.bucket), indent=2))
        return 0
    try:
        bucket = Bucket(options.bucket)
        not_set = list(bucket.create()) if options.command == "create" else []
        findings = list(bucket.check())
    except (BotoCoreError, ClientError, ValueError) as error:
        what = re.sub(r"//[^/\s]*@", "//", str(error).rstrip("."))
        print(
            f"{options.bucket}: {what}. Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the credentials", file=sys.stderr
        )
        return 2
    print(*not_set, *findings, sep="\n")
    needed = {"conditional writes"} if options.command == "create" else {finding.name for finding in findings}
    return int(any(finding.state == WRONG and finding.name in needed for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
