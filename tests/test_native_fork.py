"""A process that forks after a pass: the engine's threads are not in the child, which starts its own.

Each child has a time limit of its own, so that one that hangs is a failure and no hang of the tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from helpers import fill
from medusa.engines.native import NativeBackend
from medusa.engines.native_config import native_config
from medusa.errors import UsageError
from test_transformers_backend import Nodes
from tiny_models import make_model, shared_model

pytest.importorskip("medusa_native")

# Newer versions of Python warn of a fork beside threads, which is what is tried here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

LIMIT_SECONDS = 60
TREE = Nodes((1, 2, 3, 4, 5), (-1, 0, 0, 1, 3))


def native(threads: int = 3) -> NativeBackend:
    model = shared_model("llama")
    return NativeBackend(native_config(model.config), model.state_dict(), dtype="float32", threads=threads)


def passes(backend: NativeBackend) -> bytes:
    """The bits of a prompt and of a tree after it."""
    prompt = fill(backend, 0, list(range(20)))[0].numpy().tobytes()  # copied, as the next pass writes there
    return prompt + backend.verify([0], [TREE])[0].numpy().tobytes()


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` gives in a child of this process, which must end by itself, in order and in time."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(LIMIT_SECONDS)
            os.write(write, work())
            code = 0
        except BaseException:  # noqa: BLE001 - nothing of the parent may run in the child
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = pipe.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return found


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_child_forked_after_a_pass_has_the_bits_of_its_parent(threads: int) -> None:
    backend = native(threads)
    expected = passes(backend)
    assert in_child(lambda: passes(backend)) == expected
    assert passes(backend) == expected, "the parent goes on"


def test_a_child_forked_before_the_first_pass_and_the_child_of_a_child_have_the_same_bits() -> None:
    expected = passes(native())
    backend = native()
    assert in_child(lambda: in_child(lambda: passes(backend))) == expected
    assert in_child(lambda: passes(backend) + in_child(lambda: passes(backend))) == 2 * expected
    assert passes(backend) == expected


def test_a_child_goes_on_with_the_slots_of_its_parent() -> None:
    backend, alone = native(), native()
    for one in (backend, alone):
        fill(one, 0, list(range(20)))
        one.verify([0], [TREE])

    def goes_on() -> bytes:
        backend.keep([0], [[0, 1, 3]])
        return backend.verify([0], [TREE])[0].numpy().tobytes()

    alone.keep([0], [[0, 1, 3]])
    expected = alone.verify([0], [TREE])[0].numpy().tobytes()
    assert in_child(goes_on) == expected
    assert goes_on() == expected, "what the child kept is not kept here"


def test_an_engine_can_be_let_go_and_made_anew_in_a_child() -> None:
    backends = [native()]
    expected = passes(backends[0])

    def anew() -> bytes:
        backends.clear()  # never called here
        first = native()
        found = passes(first)
        del first
        return found

    assert in_child(anew) == expected
    assert passes(backends[0]) == expected


def _send(backend: NativeBackend, to: Connection) -> None:
    signal.alarm(LIMIT_SECONDS)
    to.send_bytes(passes(backend))


def _nothing(backend: NativeBackend) -> None:
    signal.alarm(LIMIT_SECONDS)


def test_workers_of_multiprocessing_that_are_forked_can_use_the_engine() -> None:
    backend = native()
    expected = passes(backend)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    workers = [context.Process(target=_send, args=(backend, there)) for _ in range(2)]
    workers.append(context.Process(target=_nothing, args=(backend,)))
    for worker in workers:
        worker.start()
    there.close()  # so that nothing is awaited from workers that have died
    found = [here.recv_bytes() for _ in range(2)]
    for worker in workers:
        worker.join()
    assert found == [expected] * 2
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


LEAVES = """
import sys; sys.path.insert(0, sys.argv[1])
import os, signal
from test_native_fork import native, passes
backend = native()
expected = passes(backend)
child = os.fork()
if child == 0:
    signal.alarm(60)
    if sys.argv[2] == "a pass": assert passes(backend) == expected
    sys.exit(7)  # in order: what is left is destroyed
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert status == 7, status
assert passes(backend) == expected
"""


@pytest.mark.parametrize("work", ["a pass", "nothing"])
def test_a_child_that_leaves_in_order_destroys_the_engine(work: str) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", LEAVES, str(Path(__file__).parent), work]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_child_forked_while_another_thread_is_in_a_pass_refuses_the_engine_but_may_make_another() -> None:
    model = make_model("llama", hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config, weights = native_config(model.config), model.state_dict()
    busy = NativeBackend(config, weights, dtype="float32", threads=2, isa="portable")
    fill(busy, 0, [1])
    wide = Nodes((1,) * 256, (-1, *([0] * 255)))
    inside, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            inside.set()
            busy.verify([0], [wide])

    def tries() -> bytes:
        try:
            busy.verify([0], [wide])
        except UsageError as error:
            fresh = NativeBackend(config, weights, dtype="float32", threads=2, isa="portable")
            fill(fresh, 0, [1])
            fresh.verify([0], [wide])
            return str(error).encode()
        return b""

    thread = threading.Thread(target=work)
    thread.start()
    try:
        inside.wait()
        # A thread that lets go of Python's lock for each pass is nearly always inside one.
        found = [in_child(tries) for _ in range(4)]
    finally:
        stop.set()
        thread.join()
    refusals = {message for message in found if message}
    assert len(refusals) == 1
    assert b"another thread" in refusals.pop()
