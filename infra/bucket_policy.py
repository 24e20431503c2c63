"""What a bucket must say of itself, and what each role may do in it: documents of S3 and IAM, made here alone.

runs/             SPECK_STORAGE=s3://BUCKET/runs: checkpoints, journals, artifacts
runs/promotions/  the ledger of promotions: written once, under a condition, and never deleted
dvc/              the DVC remote, and SPECK_DATA_SOURCE=s3://BUCKET/dvc
mlflow/           MLflow's artifacts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RUNS, PROMOTIONS, DVC, MLFLOW = "runs", "runs/promotions", "dvc", "mlflow"
# Objects that a promotion writes to see whether the server honours conditions; nobody may delete them either.
PROBES = f"{PROMOTIONS}/.probes"
ABORT_UPLOADS_AFTER_DAYS = 3
# Checkpoints are replaced every few minutes; docs/deploy.md counts what those that were take up.
KEEP_OLD_RUNS_DAYS = 1
KEEP_OLD_DAYS = 30

Document = dict[str, Any]


def bucket_policy(bucket: str, *, tls: bool = True) -> Document:
    """What nobody may do, whoever it is: speak without TLS, and change or delete what stands in the ledger."""
    ledger = f"{_arn(bucket)}/{PROMOTIONS}/*"
    statements: list[Document] = [
        _deny("KeepTheLedger", ["s3:DeleteObject", "s3:DeleteObjectVersion", "s3:PutObjectAcl"], ledger),
        _deny(
            "WriteTheLedgerOnce",
            ["s3:PutObject"],
            ledger,
            # Without If-None-Match. The parts of an upload have no condition; what completes it has.
            {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}},
        ),
    ]
    if tls:
        everything = [_arn(bucket), f"{_arn(bucket)}/*"]
        statements.append(_deny("TlsOnly", ["s3:*"], everything, {"Bool": {"aws:SecureTransport": "false"}}))
    return {"Version": "2012-10-17", "Statement": statements}


def ray_policy(bucket: str) -> Document:
    """Nodes of the Ray cluster: they keep runs, and read datasets. The ledger is none of their business."""
    return _document(
        *_list(bucket, RUNS, DVC),
        _allow("KeepRuns", _READ + _WRITE + _DELETE, bucket, f"{RUNS}/*"),
        {
            "Sid": "LeaveTheLedger",
            "Effect": "Deny",
            "Action": ["s3:PutObject", "s3:DeleteObject"],
            "Resource": [f"{_arn(bucket)}/{PROMOTIONS}/*"],
        },
        _allow("ReadDatasets", _READ, bucket, f"{DVC}/*"),
    )


def flow_policy(bucket: str) -> Document:
    """Flows: they follow and clean up runs, decide about promotions, and send dataset versions."""
    return _document(
        *_list(bucket, RUNS, DVC),
        # Also the ledger, which lies below it: the bucket's own policy says how.
        _allow("KeepRunsAndDecide", _READ + _WRITE + _DELETE, bucket, f"{RUNS}/*"),
        _allow("SendDatasets", _READ + _WRITE, bucket, f"{DVC}/*"),
    )


def mlflow_policy(bucket: str) -> Document:
    """The MLflow server: its artifacts, and nothing else."""
    return _document(*_list(bucket, MLFLOW), _allow("KeepArtifacts", _READ + _WRITE + _DELETE, bucket, f"{MLFLOW}/*"))


ROLES: dict[str, Callable[[str], Document]] = {"ray": ray_policy, "flow": flow_policy, "mlflow": mlflow_policy}


def lifecycle() -> Document:
    """What goes by itself: parts of uploads that nobody completed, what was replaced or deleted, and probes."""
    return {
        "Rules": [
            {
                "ID": "uncompleted-uploads",
                "Status": "Enabled",
                "Filter": {"Prefix": ""},
                "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": ABORT_UPLOADS_AFTER_DAYS},
            },
            {
                "ID": "probes",
                "Status": "Enabled",
                "Filter": {"Prefix": f"{PROBES}/"},
                "Expiration": {"Days": 1},
            },
            *(
                {
                    "ID": f"replaced-in-{prefix}",
                    "Status": "Enabled",
                    "Filter": {"Prefix": f"{prefix}/"},
                    "NoncurrentVersionExpiration": {"NoncurrentDays": days},
                }
                for prefix, days in ((RUNS, KEEP_OLD_RUNS_DAYS), (DVC, KEEP_OLD_DAYS), (MLFLOW, KEEP_OLD_DAYS))
            ),
        ]
    }


ENCRYPTION: Document = {"Rules": [{"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}]}
NOT_PUBLIC: Document = dict.fromkeys(
    ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets"), True
)

_READ = ["s3:GetObject"]
_WRITE = ["s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
# Not DeleteObjectVersion: what a role deletes stays for a few days as a former version.
_DELETE = ["s3:DeleteObject"]


def _arn(bucket: str) -> str:
    return f"arn:aws:s3:::{bucket}"


def _document(*statements: Document) -> Document:
    return {"Version": "2012-10-17", "Statement": list(statements)}


def _allow(sid: str, actions: list[str], bucket: str, below: str) -> Document:
    return {"Sid": sid, "Effect": "Allow", "Action": actions, "Resource": [f"{_arn(bucket)}/{below}"]}


def _list(bucket: str, *prefixes: str) -> tuple[Document, ...]:
    below = [pattern for prefix in prefixes for pattern in (prefix, f"{prefix}/*")]
    return (
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": ["s3:ListBucket", "s3:ListBucketMultipartUploads"],
            "Resource": [_arn(bucket)],
            # Only to whoever may list S3 says that an object is not there, and forbids it to others. Such a question
            # has no prefix: hence IfExists.
            "Condition": {"StringLikeIfExists": {"s3:prefix": below}},
        },
    )


def _deny(sid: str, actions: list[str], resources: str | list[str], condition: Document | None = None) -> Document:
    statement = {"Sid": sid, "Effect": "Deny", "Principal": "*", "Action": actions, "Resource": resources}
    return statement | ({} if condition is None else {"Condition": condition})
