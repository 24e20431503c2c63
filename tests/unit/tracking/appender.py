"""A process that appends to a ledger: STORAGE_URL ('-' for none) HOME WHO COUNT. Prints a line for each one kept."""

from __future__ import annotations

import sys
from pathlib import Path

from decided import entry

from tracking.authority import Overtaken, open_authority

url, home, who, count = sys.argv[1:]
authority = open_authority(None if url == "-" else url, Path(home))
generation = len(authority.entries("raced"))
for number in range(int(count)):
    while True:
        generation += 1
        try:
            authority.append(entry("raced", generation, 1, who=who, why=f"{who} {number}"))
            break
        except Overtaken:
            continue
    print(generation, f"{who} {number}", flush=True)
