"""Calls of the agent's own modules inside a test host, where the runtime and its state are."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.lab.containers import ContainerHost

_FRAME = """
import json, sys, dataclasses
import msgspec
from pathlib import Path
from protocol.errors import MigrateError
def plain(value):
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    return msgspec.to_builtins(value)
try:
{body}
except MigrateError as error:
    print(json.dumps({{"error": type(error).__name__, "code": error.code, "text": str(error)}}))
else:
    print(json.dumps({{"result": result}}, default=plain))
"""


def call(host: ContainerHost, program: str) -> Any:
    """What `program` (statements that set `result`) gives there; a MigrateError as a dict error, code, text."""
    body = "\n".join(f"    {line}" for line in program.strip().splitlines())
    said = json.loads(host.run([sys.executable, "-c", _FRAME.format(body=body)]).stdout)
    return said.get("result", said)


def without_network(config: dict[str, Any]) -> None:
    """For `make_bundle`: the runtime makes the network namespace."""
    for namespace in config["linux"]["namespaces"]:
        if namespace["type"] == "network":
            del namespace["path"]
