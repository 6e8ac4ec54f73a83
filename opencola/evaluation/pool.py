"""Work that is shared out among processes."""

import contextlib
import multiprocessing
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from opencola.data.processes import interrupts_held_back

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(prepare: Callable[[], Callable[[Item], Result]], items: Sequence[Item], processes: int) -> Generator[Result]:
    """What becomes of every item, as it is ready, by so many processes (one: this one, in order).

    prepare: called once in each process, returns what works on an item; for several processes it must be picklable.
    The processes end when this one does, however it ends. Raises ValueError and OSError as they do, and OSError when
    one of them dies.
    """
    if processes == 1 or len(items) < 2:
        work = prepare() if items else None
        yield from (work(item) for item in items if work is not None)
        return
    context = multiprocessing.get_context("spawn")
    left = deque(items)
    workers: dict[Connection, BaseProcess] = {}
    try:
        while left and len(workers) < processes:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_work, args=(theirs, prepare), daemon=True)
            with interrupts_held_back():
                process.start()
            theirs.close()  # so that the end of the process is the end of what comes from it
            ours.send(left.popleft())
            workers[ours] = process
        while workers:
            for connection in wait(list(workers)):
                assert isinstance(connection, Connection)
                result: Result = _receive(connection)
                if left:
                    connection.send(left.popleft())
                else:
                    connection.close()  # which ends the process
                    workers.pop(connection).join()
                yield result
    finally:
        for process in workers.values():
            process.terminate()
            process.join()


def _receive(connection: Connection) -> Any:
    try:
        result = connection.recv()
    except (EOFError, ConnectionResetError):
        raise OSError(
            "a process has died (out of memory?), but what is done is kept: try fewer --processes, or less --batch-size"
        ) from None
    if isinstance(result, Exception):
        raise result
    return result


def _work(connection: Connection, prepare: Callable[[], Callable[[Item], Result]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    work = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there any more
        while True:
            item = connection.recv()
            try:
                work = work or prepare()
                result: Result | Exception = work(item)
            except Exception as error:
                error.add_note(f"in a process of its own:\n{traceback.format_exc()}")
                result = error
            connection.send(result)
