"""Stages of a pipeline that run in threads and keep the order of their items."""
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor


def prefetch(items, stop: threading.Event, depth: int = 4):
    """Yield the items of a generator, which a thread of its own computes up to `depth` items early.

    Sets `stop` when the consumer is done or has failed, so that a generator that waits for a network can give up.
    """
    end, pool = object(), ThreadPoolExecutor(1)
    try:
        futures = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := futures.popleft().result()) is not end:
            futures.append(pool.submit(next, items, end))
            yield item
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        items.close()


def map_in_order(function, items, threads: int):
    """Yield function(item) for each item of a generator, in order, computed by `threads` threads.

    An error of the generator is raised after the results of the items before it.
    """
    futures, pool, end, error = deque(), ThreadPoolExecutor(threads), object(), None
    try:
        while True:
            try:
                item = next(items, end)
            except Exception as caught:
                item, error = end, caught
            if item is end:
                break
            futures.append(pool.submit(function, item))
            if len(futures) > 2 * threads:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
        if error:
            raise error
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()


def in_background(action):
    """Return action(), run by a thread that a signal leaves behind; libraries may wait for a whole download."""
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def count_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
