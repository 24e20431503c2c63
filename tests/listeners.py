"""Who of a stack listens beyond the loopback, and what it answers to a caller without Ray's token."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

import grpc
import psutil
from services.stack import Running

# One of each service that Ray's processes speak; a port knows its own alone. None of them changes anything.
METHODS = [
    f"/ray.rpc.{name}"
    for name in (
        "JobInfoGcsService/GetAllJobInfo", "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull",
        "ReporterService/GetTraceback", "CoreWorkerService/GetCoreWorkerStats",
    )
]  # fmt: skip
# Ray's daemons, which listen on all addresses whatever they are told.
OPEN_TO_ALL = {"gcs_server", "raylet", "ray::DashboardAgent"}


def beyond_loopback(running: Running) -> set[tuple[str, int]]:
    """Name and port of each process of the stack that listens on another address than the loopback's."""
    found = set()
    for process in running.processes():
        with suppress(psutil.Error):
            for connection in process.net_connections():
                address = ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:"))
                if connection.status == psutil.CONN_LISTEN and not address.is_loopback:
                    found.add((process.name(), connection.laddr.port))
    return found


def without_token(port: int) -> str:
    """`refused`, or `answered` where a method gave anything else; `no gRPC` where another protocol is spoken."""
    codes = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=5)
                codes.add(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                codes.add(error.code())
    codes.discard(grpc.StatusCode.UNIMPLEMENTED)
    if codes == {grpc.StatusCode.UNAUTHENTICATED}:
        return "refused"
    return "no gRPC" if codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED} else "answered"
