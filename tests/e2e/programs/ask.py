"""A client that asks server.py over ONE connection: each line on stdin sends `status`, each answer is a line on stdout."""

from __future__ import annotations

import socket
import sys


def main() -> None:
    """ask.py ADDRESS PORT."""
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30) as connection:
        stream = connection.makefile("rw")
        print("connected", flush=True)
        for _ in sys.stdin:
            stream.write("status\n")
            stream.flush()
            answer = stream.readline()
            if not answer:
                raise SystemExit("the connection was closed")
            print(answer, end="", flush=True)


if __name__ == "__main__":
    main()
