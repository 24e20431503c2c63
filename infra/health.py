"""Whether each service of the stack does what it is for, asked with the stack's own credentials."""

from __future__ import annotations

import json
import urllib.error
from datetime import datetime
from typing import Any

from infra.servers import ask, mlflow_probe, status
from infra.stack import NODE, WORK_POOL, Stack


def fault(stack: Stack, name: str, since_s: float = 0.0) -> str | None:
    """What is wrong with a service, in a few words; None when it works.

    `since_s` (of time.time) is when its process started: a worker that was online before is not the one of now.
    """
    try:
        return _CHECKS[name](stack, since_s)
    except urllib.error.HTTPError as error:
        return f"answers {error.code} to our credentials"
    except (OSError, ValueError, LookupError) as error:
        return f"does not answer ({type(error).__name__})"


def _postgres(stack: Stack, _since_s: float) -> str | None:
    import psycopg

    try:
        psycopg.connect(stack.database("postgres") or "", connect_timeout=5).close()
    except psycopg.Error as error:
        return str(error).strip().splitlines()[0].rpartition("failed: ")[2]
    return None


def _s3(stack: Stack, _since_s: float) -> str | None:
    # The door answers before rclone, which is behind it, does: what bears a signature goes through.
    return None if status(stack.url("s3"), "AWS4-HMAC-SHA256 of nobody") in {400, 403} else "does not answer"


def _mlflow(stack: Stack, _since_s: float) -> str | None:
    return _refusal(status(mlflow_probe(stack.url("mlflow")), stack.credentials.basic))


def _prefect(stack: Stack, _since_s: float) -> str | None:
    return _refusal(status(f"{stack.api_url}/admin/version", stack.credentials.basic))


def _worker(stack: Stack, since_s: float) -> str | None:
    url = f"{stack.api_url}/work_pools/{WORK_POOL}/workers/filter"
    with ask(url, stack.credentials.basic, body={}) as answer:
        workers = json.load(answer)
    for worker in workers:
        seen_s = datetime.fromisoformat(worker["last_heartbeat_time"].replace("Z", "+00:00")).timestamp()
        if worker["status"] == "ONLINE" and seen_s >= since_s:
            return None
    return "is not online yet"


def _ray_head(stack: Stack, _since_s: float) -> str | None:
    return _refusal(status(f"{stack.url('ray-head')}/api/version", bearer(stack)))


def _ray_node(stack: Stack, _since_s: float) -> str | None:
    with ask(f"{stack.url('ray-head')}/nodes?view=summary", bearer(stack)) as answer:
        nodes: list[dict[str, Any]] = json.load(answer)["data"]["summary"]
    known = any(node["ip"] == NODE and node["raylet"].get("state") == "ALIVE" for node in nodes)
    return None if known else "is not known to the head"


def bearer(stack: Stack) -> str:
    """The `Authorization` header with Ray's token."""
    return f"Bearer {stack.token_file.read_text(encoding='utf-8').strip()}"


def _refusal(answered: int | None) -> str | None:
    if answered is None:
        return "does not answer"
    return None if answered == 200 else f"answers {answered} to our credentials"


_CHECKS = {
    "postgres": _postgres,
    "s3": _s3,
    "mlflow": _mlflow,
    "prefect": _prefect,
    "worker": _worker,
    "ray-head": _ray_head,
    "ray-node": _ray_node,
}
