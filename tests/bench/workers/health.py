"""Asks a server for its health again and again, from a process of its own, so that no other client makes it wait.

    python -m tests.bench.workers.health http://127.0.0.1:8000/health 20

Prints the seconds that each answer took, as a JSON list; an answer that isn't 200 ends it with an error.
"""

from __future__ import annotations

import json
import sys
import time

import httpx

PAUSE = 0.01  # between an answer and the next question


def main() -> int:
    url, seconds = sys.argv[1], float(sys.argv[2])
    taken = []
    with httpx.Client(trust_env=False, timeout=60) as client:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            client.get(url).raise_for_status()
            taken.append(time.perf_counter() - start)
            time.sleep(PAUSE)
    print(json.dumps(taken))
    return 0


if __name__ == "__main__":
    sys.exit(main())
