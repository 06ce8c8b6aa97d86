#!/usr/bin/env python3
"""Writes the reference pages that come from the code: wire format, states, error codes, support matrix.

python docs/generate.py           write them
python docs/generate.py --check   status 1 and their names if they are not what the code says
"""

from __future__ import annotations

import enum
import inspect
import re
import struct
import sys
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from agent.engine.native.registry import RESOURCES  # noqa: E402
from protocol import codec, connection, errors, framing, link_messages, messages, pages, states  # noqa: E402

REFERENCE = ROOT / "docs" / "reference"
FIELD_COMMENT = re.compile(r"^    (\w+): [^#\n]*#\s*(.*)$", re.MULTILINE)
MEMBER_COMMENT = re.compile(r"^    ([A-Z_]+) = [^#\n]*#\s*(.*)$", re.MULTILINE)
MARK = "<!-- Written by docs/generate.py from the code. Change the code, then run it. -->\n"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def size(count: int) -> str:
    for unit, name in ((1 << 40, "TiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {name}"
    return f"{count} bytes"


def comments(cls: type, pattern: re.Pattern[str]) -> dict[str, str]:
    return dict(pattern.findall(inspect.getsource(cls)))


def type_name(info: msgspec.inspect.Type) -> str:
    kinds = msgspec.inspect
    match info:
        case kinds.Metadata():
            return type_name(info.type)
        case kinds.StructType():
            return f"[{info.cls.__name__}](#{info.cls.__name__.lower()})"
        case kinds.UnionType():
            return " or ".join(type_name(member) for member in info.types)
        case kinds.ListType():
            limit = f", at most {info.max_length}" if info.max_length is not None else ""
            return f"array of {type_name(info.item_type)}{limit}"
        case kinds.DictType():
            return f"map of {type_name(info.key_type)} to {type_name(info.value_type)}"
        case kinds.NoneType():
            return "nil"
        case kinds.StrType():
            if info.pattern:
                return f"text `{info.pattern}`"
            return "text" + (f", at most {size(info.max_length)}" if info.max_length else "")
        case kinds.IntType() | kinds.FloatType():
            name = "integer" if isinstance(info, kinds.IntType) else "float"
            low = f" ≥ {info.ge}" if info.ge is not None else ""
            high = f", ≤ {power(info.le)}" if info.le is not None else ""
            return f"{name}{low}{high}"
        case kinds.BoolType():
            return "boolean"
        case kinds.BytesType():
            return "bytes"
    raise NotImplementedError(str(info))


def power(value: float) -> str:
    number = int(value)
    return f"2^{number.bit_length() - 1}" if number > 1 << 20 and number & (number - 1) == 0 else str(value)


def record(cls: type[msgspec.Struct]) -> str:
    info = msgspec.inspect.type_info(cls)
    notes = comments(cls, FIELD_COMMENT)
    rows = []
    for field in info.fields:
        if field.required:
            default = "required"
        elif field.default is not msgspec.NODEFAULT:
            default = f"`{field.default!r}`"
        else:
            default = f"`{field.default_factory()!r}`"
        rows.append([f"`{field.name}`", type_name(field.type), default, notes.get(field.name, "")])
    own_text = cls.__dict__.get("__doc__") or ""
    text = f"### {cls.__name__}\n\n" + (f"{inspect.cleandoc(own_text)}\n\n" if own_text else "")
    return text + (table(["field", "type", "if left out", "meaning"], rows) if rows else "No fields.\n") + "\n"


def reachable_records() -> list[type[msgspec.Struct]]:
    """The parts of messages, in the order of the source."""
    return [
        cls
        for cls in vars(messages).values()
        if isinstance(cls, type) and issubclass(cls, messages.Record) and cls is not messages.Record
    ]


def members(cls: type[enum.Enum]) -> str:
    notes = comments(cls, MEMBER_COMMENT)
    return table(["value", "name", "meaning"], [[f"`{m.value}`", m.name, notes.get(m.name, "")] for m in cls])


def struct_text(layout: struct.Struct) -> str:
    return f"`{layout.format}` ({layout.size} bytes)"


def wire_format() -> str:
    versions = ", ".join(map(str, messages.VERSIONS))
    requests = messages.RequestBody.__args__
    replies = messages.ReplyBody.__args__
    out = f"""# Wire format

{MARK}
Protocol versions of this release: {versions}. Everything here crosses the network inside SSH only.
Struct formats are those of Python's `struct`: `>` big-endian, `<` little-endian, `B` 1, `I` 4, `Q` 8 bytes.

## Frames

Every link is a sequence of frames: header {struct_text(framing.HEADER)} = kind, payload bytes; then the payload, at most
{framing.MAX_PAYLOAD_BYTES} bytes. An unknown kind or a longer payload ends the connection.

{members(framing.FrameKind)}
## Messages

The payload of a CONTROL or AGENT frame is one msgpack map. Its key `type` names the message, the other keys are its
fields. A message has at most {size(codec.MAX_MESSAGE_BYTES)}, an array or map at most {power(codec.MAX_ITEMS)} items;
extension types are refused. An unknown field, a missing required one, a value of another type or out of its range, and bytes
behind the message end the connection: see [decision 6](../explanation/decisions/0006-schema-strictness.md).

## The control conversation

- The coordinator sends `Request` only, an agent `Reply` and `Notice` only; frame kinds CONTROL, PING and PONG only; a frame
  has at most {size(connection.MAX_CONTROL_BYTES)}.
- The first request, and no other, is `Hello`. Until it was answered by `Welcome`, whose version is one of those offered,
  nothing else is asked or told.
- Request numbers grow. At most {connection.MAX_PENDING_REQUESTS} requests are without a reply. Replies come in any order;
  each answers one pending request with the type named below, or with `Failure`.
- PING and PONG carry 8 bytes; a PONG repeats those of its PING. Who has heard nothing for {connection.IDLE_S:g} s sends a PING; after
  {connection.MAX_UNANSWERED_PINGS} without any sign of life, {connection.IDLE_S:g} s apart, the link is lost.
- The stream may end between two frames only. After any violation the connection is of no more use.

{table(["request", "answer"], [[type_name(msgspec.inspect.type_info(a)), type_name(msgspec.inspect.type_info(messages.ANSWERS[a]))] for a in requests])}
## Envelopes

"""
    out += "".join(record(cls) for cls in (messages.Request, messages.Reply, messages.Notice))
    out += "## Requests\n\n" + "".join(record(cls) for cls in requests)
    out += "## Replies\n\n" + "".join(record(cls) for cls in replies)
    out += "## Notices\n\n" + record(messages.Progress)
    out += "## Between agents, over the data link (AGENT frames)\n\n"
    out += "".join(record(cls) for cls in link_messages.LinkMessage.__args__)
    out += "## Parts of messages\n\n" + "".join(record(cls) for cls in reachable_records())
    out += f"""## Page batches (PAGES frames)

1. Header {struct_text(pages.HEADER)}: task, codec, number of runs, raw bytes. For ZERO the last is in pages of {pages.PAGE_BYTES} bytes.
2. Runs, `<QQ` ({pages.RUN_BYTES} bytes) each: address, bytes.
3. Data: the contents of all runs one behind the other, packed as the codec says.

{members(pages.PageCodec)}
A batch has 1 to {pages.MAX_RUNS} runs, in whole pages, ascending, not overlapping, none empty, all below {pages.MAX_ADDRESS:#x}; their
bytes add up to 'raw bytes', at most {size(pages.MAX_RAW_BYTES)}, for ZERO {size(pages.MAX_ZERO_BYTES)}. Data is as long as 'raw bytes' for RAW, empty for
ZERO, else not empty and at most {pages.MAX_EXPANSION_BYTES} bytes longer than 'raw bytes'. A batch out of these bounds ends the connection.
"""
    return out


def state_page() -> str:
    out = f"""# States of a migration

{MARK}
Each agent keeps a state of its own for a migration, in its journal. What is not in these diagrams is illegal. The container
belongs to the target from the source's record `committed` on; [decision 5](../explanation/decisions/0005-commit-by-freezer-and-journal.md) says why.

"""
    names = comments(states.State, MEMBER_COMMENT)
    for side in states.Side:
        rows = [(state, event, to) for (row_side, state, event), to in states.TRANSITIONS.items() if row_side is side]
        used = {states.State.PREPARING} | {to for _, _, to in rows}
        out += f"## The {side.value}\n\n```mermaid\nstateDiagram-v2\n    [*] --> {states.State.PREPARING.name}\n"
        out += "".join(f"    {state.name} --> {to.name}: {event.value}\n" for state, event, to in rows)
        out += "".join(f"    {state.name} --> [*]\n" for state in states.State if state in states.FINAL & used)
        out += "```\n\n"
        out += table(
            ["state", "owner", "may abort alone", "the same with its tasks gone"],
            [
                [
                    f"`{state.value}`",
                    states.owner(state).value,
                    "yes" if states.may_abort(side, state) else "no",
                    "yes" if states.may_abort(side, state, tasks_alive=False) else "no",
                ]
                for state in states.State
                if state in used
            ],
        )
        heard = sorted((state.value, event.value) for row_side, state, event in states.REPEATS if row_side is side)
        out += "\nHeard again without effect: " + "; ".join(f"{event} in `{state}`" for state, event in heard) + ".\n\n"
    out += "## Meaning\n\n" + table(
        ["state", "meaning"], [[f"`{s.value}`", names.get(s.name, "")] for s in states.State]
    )
    return out


def error_page() -> str:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.MigrateError)]
    rows = [
        [f"`{cls.code}`", str(cls.exit_status), cls.__name__, inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0]]
        for cls in sorted(classes, key=lambda cls: (cls.exit_status, cls.code, cls.__name__))
    ]
    return f"""# Error codes

{MARK}
`error.code` in `--json` output is the code of the family below, or a finer one of the same family (`io-uring` is refused with the
exit status of `unsupported`); codes are never renamed. `error.host` says where, `error.hint` what to do. 130: interrupted.

{table(["family", "exit status", "class", "meaning"], rows)}"""


def support_page() -> str:
    rows = [
        [
            resource.name,
            resource.scope.value,
            resource.said("Survives") or "as it is",
            resource.said("Does not survive"),
        ]
        for resource in RESOURCES
    ]
    return f"""# What survives a move

{MARK}
Whatever does not survive is refused by `migrate check` before anything is touched, unless the line says that it is only told.

{table(["resource", "scope", "survives", "does not survive"], rows)}"""


PAGES = {
    "wire-format.md": wire_format,
    "states.md": state_page,
    "error-codes.md": error_page,
    "support-matrix.md": support_page,
}


def main() -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = REFERENCE / name, make()
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(str(path.relative_to(ROOT)))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print("not what the code says; run python docs/generate.py:", *stale, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
