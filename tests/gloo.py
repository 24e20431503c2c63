"""Real process groups over gloo: the same function on every rank, in groups of several sizes one after the other.

`python gloo.py RANK FOLDER SCRIPT SIZE...` is one rank; `on_all_ranks` starts them and is rank 0 itself.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATIENCE = timedelta(seconds=120)


def on_all_ranks(script: Path, folder: Path, sizes: tuple[int, ...]) -> dict[int, list[Any]]:
    """What `run(folder)` of a script returns in every group: by the group's size, a list by rank.

    A group of one is this process without a process group. Importing everything is what takes the time, so that a
    process is in every group that has its rank.
    """
    names = [str(size) for size in sizes]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    others = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder), str(script), *names], env=environment)
        for rank in range(1, max(sizes))
    ]
    try:
        mine = _in_each_group(0, folder, script, sizes)
        assert [other.wait(timeout=PATIENCE.total_seconds()) for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
            other.wait()
    return {size: [mine[size], *(torch.load(_result(folder, rank, size)) for rank in range(1, size))] for size in sizes}


def _in_each_group(rank: int, folder: Path, script: Path, sizes: tuple[int, ...]) -> dict[int, Any]:
    specification = importlib.util.spec_from_file_location(script.stem, script)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    results = {}
    # The largest first, so that nobody waits for a rank that is still in a group without it.
    for size in sorted((size for size in sizes if rank < size), reverse=True):
        if size > 1:
            rendezvous = f"file://{folder}/rendezvous-{size}"
            dist.init_process_group("gloo", rendezvous, PATIENCE, rank=rank, world_size=size)
        try:
            results[size] = module.run(folder)
        finally:
            if size > 1:
                dist.destroy_process_group()
    return results


def _result(folder: Path, rank: int, size: int) -> Path:
    return folder / f"rank-{rank}-of-{size}.pt"


def main() -> None:
    rank, folder, script = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    for size, result in _in_each_group(rank, folder, script, tuple(map(int, sys.argv[4:]))).items():
        torch.save(result, _result(folder, rank, size))


if __name__ == "__main__":
    main()
