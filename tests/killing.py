"""Kills of real processes, at a chosen change that they make to a folder.

As a script it is the command line of the package, killed at such a moment:
`python killing.py PART NUMBER embedder's arguments`.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count

# What Python tells of, before it is done: https://docs.python.org/3/library/audit_events.html
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
_SWAP = "renameat2"  # of two names: it is known that it comes, but not of which


def kill_at(part: str, number: int) -> None:
    """Have this process killed just before a change of a path that holds `part`.

    Args:
        part: Of the path. Swaps of two names, which come without, count too.
        number: Which of these changes, from 1.
    """
    numbers = iter(range(1, number))

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        is_change = event in _CHANGES or (event == "open" and arguments[1] not in ("r", "rb"))
        is_of_part = is_change and part in repr(arguments)
        is_swap = event == "ctypes.dlsym" and _SWAP in repr(arguments)
        if (is_of_part or is_swap) and next(numbers, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def kills(part: str, begin: Callable[[], None], act: Callable[[], None]) -> Iterator[int]:
    """Kill `act` at its first change, at its second, and so on until it ends by itself.

    Yields:
        The number of the change, after each kill.
    """
    for number in count(1):
        begin()
        process_id = os.fork()
        if not process_id:
            kill_at(part, number)
            act()
            os._exit(0)
        _, status = os.waitpid(process_id, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return
        yield number


if __name__ == "__main__":
    from embedder.cli.app import main

    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.argv[1:] = sys.argv[3:]
    main()
