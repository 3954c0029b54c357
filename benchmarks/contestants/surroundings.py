"""Where a contestant finds Redis and the receiver: its environment says so."""

from __future__ import annotations

import os

REDIS = os.environ["BENCHMARK_REDIS"]
URL = os.environ["BENCHMARK_URL"] + "/api/v1/usage-records"
CA = os.environ["BENCHMARK_CA"]
CONSUMER = os.environ["BENCHMARK_CONSUMER"]
HTTP = os.environ.get("BENCHMARK_HTTP", "httpx")
IN_FLIGHT = 64
READ = 500
HEADERS = {"Content-Type": "application/json", "X-API-Key": "benchmark-key"}
