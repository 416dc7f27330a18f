"""``memlib verify``: recorded runs against their checksums."""

from __future__ import annotations

from memlib.paths import cache_folder
from memlib.runs import store


def verify(options) -> int:
    """Compare the runs at some addresses, or all that the cache holds; 0 if they are whole."""
    addresses = options.addresses or sorted(
        str(file.parent) for file in cache_folder().glob(f"*/{store.PLAN}")
    )
    if not addresses:
        print(f"no run in {cache_folder()}")
    reports = [store.verify(address) for address in addresses]
    for report in reports:
        print(report)
    return 0 if all(report.ok for report in reports) else 1
