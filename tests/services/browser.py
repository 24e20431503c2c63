"""Chromium, for the pages that people look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Page, expect, sync_playwright

# Pages of a machine that is busy elsewhere.
expect.set_options(timeout=60_000)
BINARIES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def browser_page(**options: Any) -> Iterator[Page]:
    """An empty page of a browser of its own; `options` are those of `new_context`."""
    binary = next(filter(None, map(shutil.which, BINARIES)), None)
    if binary is None:
        pytest.skip(f"none of {', '.join(BINARIES)} is installed; apt-get install chromium")
    # Chromium's sandbox does not run as root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=arguments)
        page = browser.new_context(viewport={"width": 1500, "height": 1000}, **options).new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()
