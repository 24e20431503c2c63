"""A folder as a git checkout with one commit, without which a run's lineage is not complete."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
RECIPE = {"image_size_px": 128, "num_images": {"train": 16, "val": 4, "test": 4}}


def commit_all(repo: Path) -> None:
    """`git init`, and everything that git would track in a commit."""
    who = ("-c", "user.name=tests", "-c", "user.email=tests@example.org")
    for arguments in (("init", "--quiet"), ("add", "--all"), (*who, "commit", "--quiet", "--message", "as copied")):
        subprocess.run(["git", *arguments], cwd=repo, check=True)


def copy_checkout(repo: Path) -> None:
    """All that git tracks or would track, as a repository of its own with a sample of 24 small pictures."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, repo / name)
    recipe = repo / "data/raw/sample-aerial/recipe.yaml"
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | RECIPE))
    commit_all(repo)
