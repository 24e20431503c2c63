"""What the policies allow and deny, by an evaluation of our own that follows AWS's rules."""

from __future__ import annotations

from typing import Any

import pytest
from unit.infra.iam import allowed

from infra.bucket_policy import ROLES, bucket_policy

BUCKET = "arn:aws:s3:::site"
LEDGER = f"{BUCKET}/runs/promotions/sample-aerial/7.json"
RUN = f"{BUCKET}/runs/0123456789ab/checkpoints/3/model.safetensors"
OBJECT = f"{BUCKET}/dvc/files/md5/ab/cdef"
ARTIFACT = f"{BUCKET}/mlflow/1/abc/artifacts/report.html"
ADMINISTRATOR: dict[str, Any] = {"Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
TLS = {"aws__securetransport": "true"}
CREATING = TLS | {"s3__objectcreationoperation": "true"}
ONCE = CREATING | {"s3__if_none_match": "*"}


def can(role: str, action: str, resource: str, **context: str) -> bool:
    own = ADMINISTRATOR if role == "administrator" else ROLES[role]("site")
    return allowed([bucket_policy("site"), own], action, resource, **context)


@pytest.mark.parametrize(
    ("role", "action", "resource", "context"),
    [
        ("ray", "s3:GetObject", RUN, TLS),
        ("ray", "s3:PutObject", RUN, CREATING),
        ("ray", "s3:DeleteObject", RUN, TLS),
        ("ray", "s3:AbortMultipartUpload", RUN, TLS),
        ("ray", "s3:GetObject", OBJECT, TLS),
        ("ray", "s3:ListBucket", BUCKET, TLS | {"s3__prefix": "runs/0123456789ab/"}),
        ("ray", "s3:ListBucketMultipartUploads", BUCKET, TLS | {"s3__prefix": "runs/0123456789ab/x"}),
        ("ray", "s3:ListBucket", BUCKET, TLS | {"s3__prefix": "dvc/files/md5/ab/"}),
        # What S3 asks by itself before it says that an object is not there.
        ("ray", "s3:ListBucket", BUCKET, TLS),
        ("flow", "s3:PutObject", LEDGER, ONCE),
        ("flow", "s3:GetObject", LEDGER, TLS),
        ("flow", "s3:DeleteObject", RUN, TLS),
        ("flow", "s3:PutObject", OBJECT, CREATING),
        ("mlflow", "s3:PutObject", ARTIFACT, CREATING),
        ("mlflow", "s3:DeleteObject", ARTIFACT, TLS),
        ("administrator", "s3:PutBucketPolicy", BUCKET, TLS),
        ("administrator", "s3:DeleteObjectVersion", RUN, TLS),
        # The parts of an upload; its completion is asked for the condition.
        ("flow", "s3:PutObject", LEDGER, TLS | {"s3__objectcreationoperation": "false"}),
    ],
)
def test_allowed(role: str, action: str, resource: str, context: dict[str, str]) -> None:
    assert can(role, action, resource, **context)


@pytest.mark.parametrize(
    ("role", "action", "resource", "context"),
    [
        # The ledger, for everybody.
        *(
            (role, action, LEDGER, TLS)
            for role in ("ray", "flow", "mlflow", "administrator")
            for action in ("s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectAcl")
        ),
        *((role, "s3:PutObject", LEDGER, CREATING) for role in ("ray", "flow", "mlflow", "administrator")),
        ("ray", "s3:PutObject", LEDGER, ONCE),
        ("mlflow", "s3:GetObject", LEDGER, TLS),
        # Without TLS.
        ("ray", "s3:GetObject", RUN, {"aws__securetransport": "false"}),
        ("administrator", "s3:ListBucket", BUCKET, {"aws__securetransport": "false"}),
        # What is another role's.
        ("ray", "s3:PutObject", OBJECT, CREATING),
        ("ray", "s3:DeleteObject", OBJECT, TLS),
        ("flow", "s3:DeleteObject", OBJECT, TLS),
        ("ray", "s3:GetObject", ARTIFACT, TLS),
        ("mlflow", "s3:GetObject", RUN, TLS),
        ("flow", "s3:PutObject", ARTIFACT, CREATING),
        ("ray", "s3:ListBucket", BUCKET, TLS | {"s3__prefix": ""}),
        ("ray", "s3:ListBucket", BUCKET, TLS | {"s3__prefix": "mlflow/"}),
        ("mlflow", "s3:ListBucket", BUCKET, TLS | {"s3__prefix": "runs/"}),
        # Former versions, and the bucket itself.
        *((role, "s3:DeleteObjectVersion", RUN, TLS) for role in ROLES),
        *((role, "s3:PutBucketPolicy", BUCKET, TLS) for role in ROLES),
        *((role, "s3:PutLifecycleConfiguration", BUCKET, TLS) for role in ROLES),
        # A bucket, and a prefix, whose names begin alike.
        ("ray", "s3:GetObject", RUN.replace("site", "site-two"), TLS),
        ("ray", "s3:GetObject", f"{BUCKET}/runs-of-others/x", TLS),
    ],
)
def test_denied(role: str, action: str, resource: str, context: dict[str, str]) -> None:
    assert not can(role, action, resource, **context)


def test_without_tls_the_ledger_is_kept_all_the_same() -> None:
    policies = [bucket_policy("site", tls=False), ADMINISTRATOR]
    assert allowed(policies, "s3:GetObject", RUN, aws__securetransport="false")
    assert not allowed(policies, "s3:DeleteObject", LEDGER, aws__securetransport="false")
