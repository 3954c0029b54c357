"""celery, acknowledging late, with requests. Run as a program with a number, it queues so many tasks."""

from __future__ import annotations

import json
import sys
from typing import Any

import requests
from celery import Celery

from benchmarks.contestants.surroundings import CA, HEADERS, REDIS, URL
from benchmarks.load import record

app = Celery("benchmark", broker=REDIS)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
sessions: list[requests.Session] = []


def forward(usage: dict[str, Any]) -> None:
    if not sessions:
        sessions.append(requests.Session())
        sessions[0].verify = CA
        sessions[0].trust_env = False  # a CA bundle of the environment would win
    headers = {**HEADERS, "Idempotency-Key": usage["transaction_id"]}
    sessions[0].post(URL, data=json.dumps(usage).encode(), headers=headers).raise_for_status()


forward_task = app.task(name="forward")(forward)


def queue(number: int) -> None:
    with app.connection_for_write() as connection, app.amqp.producer_pool.acquire(block=True):
        for n in range(number):
            forward_task.apply_async((json.loads(record(n)),), connection=connection)


if __name__ == "__main__":
    from benchmarks.contestants import celery_tasks

    celery_tasks.queue(int(sys.argv[1]))
