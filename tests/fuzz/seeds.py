#!/usr/bin/env python3
"""Writes inputs for the fuzzer to start from: the wire's frozen examples, output as builds write it, and what may happen
to connections and files.

    python3 tests/fuzz/seeds.py

Needed again when the vectors, or what a program takes its input for, have changed.
"""

import json
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent
VECTORS = HERE.parent.parent / "crates/phonehome-proto/vectors/v1.json"

# Longer examples add nothing that a fuzzer does not find, bytes.
SHORT = 1024

# What builds write, good and bad.
SCREENS = {
    "plain": "one line\nand\tanother\r\n",
    "colour": "\x1b[1;31merror\x1b[0m: it is \x1b[38;5;208morange\x1b[39m\n\x1b[4:3mcurly\x1b[24m",
    "progress": "10%\r20%\r\x1b[K30%\rdone\n",
    "title": "\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\n",
    "cursor": "\x1b[2J\x1b[1;1H\x1b[?1049h\x1b[6nhome\n",
    "strings": "\x1bPq#0~-\x1b\\\x1b_G\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\end\n",
    "order": "if admin\u202e \u2066// check\u2069\n\u009b31m\u0085",
    "characters": "\u00e9\u65e5\U0001f680\u00a0\u0301\n",
}

# A connection, two records, a welcome, and what is sent then; how `sender` reads it.
WELCOMED = bytes([2, 0, 3, 0, 9, 6, 0, 0, 0, 0, 4])
# The end, sent and accepted.
DELIVERED = bytes([1, 4, 6, 3, 0, 0, 0])

# How `handshake` reads its input: the first byte's bits, and what callers do.
GREETED, TEXT, SHUT_DOWN, SLOWLY = 1, 2, 4, 8
RAW, REQUEST, OPEN, HELLO, RECORDS = range(1, 6)
FINISHED, PONG, ODD_FRAME, FRAME, WAIT, CONNECT, TURN_TO, CUT, CANCEL = range(7, 16)
TWO_RECORDS = bytes([RECORDS | 16, 0, 3 << 3]) + b"out" + bytes([1 | 2 << 3]) + b"er"
END = bytes([FINISHED, 0, 0])
A_WHILE = bytes([WAIT | 9 << 4])
CALLS = {
    "nothing": bytes([0]),
    "alive": bytes([0, RAW, 25]) + b"GET /healthz HTTP/1.1\r\n\r\n",
    "head": bytes([0, RAW, 26]) + b"HEAD /healthz HTTP/1.1\r\n\r\n",
    "half a request": bytes([0, RAW, 14]) + b"GET / HTTP/1.1",
    "no request": bytes([0, RAW, 5]) + b"\x16\x03\x01\x02\x00",
    "all that makes a request": bytes([0, REQUEST, 0, 6, 0, 1, 4, 6, 8, 10]),
    "with a token": bytes([0, REQUEST, 0, 7, 0, 1, 4, 6, 8, 10, 13]) + bytes([HELLO, 0, 0]) + A_WHILE,
    "with another token": bytes([0, REQUEST, 0, 7, 0, 1, 4, 6, 8, 12, 14]) + bytes([HELLO | 16, 0, 0]) + A_WHILE,
    "with a wrong token": bytes([0, REQUEST, 0, 7, 0, 1, 4, 6, 8, 10, 15]),
    "with a body": bytes([0, REQUEST, 2, 3, 0, 18, 20, RAW, 5]) + b"12345",
    "another one's build": bytes([0, OPEN, HELLO | 16, 0, 0]) + A_WHILE,
    "two builds": bytes([GREETED]) + TWO_RECORDS + bytes([CONNECT, OPEN | 32, HELLO | 16, 0, 0]) + TWO_RECORDS + END,
    "silence": bytes([GREETED]),
    "delivered": bytes([GREETED]) + TWO_RECORDS + END + A_WHILE,
    "delivered, text": bytes([GREETED | TEXT]) + TWO_RECORDS + END + A_WHILE,
    "delivered and closed": bytes([GREETED]) + TWO_RECORDS + END + A_WHILE + bytes([ODD_FRAME, 0x88, 0, 2, 3, 232]),
    "another end": bytes([GREETED]) + TWO_RECORDS + bytes([FINISHED, 3, 0]) + A_WHILE + TWO_RECORDS + END,
    "resumed": bytes([GREETED]) + TWO_RECORDS + bytes([CUT, CONNECT, OPEN, HELLO, 0, 2, RECORDS, 2, 8, 65]) + END,
    "superseded": bytes([GREETED]) + TWO_RECORDS + bytes([CONNECT, OPEN, HELLO, 0, 2, TURN_TO]) + TWO_RECORDS,
    "another life": bytes([GREETED]) + TWO_RECORDS + bytes([CONNECT, OPEN, HELLO | 64, 0, 0]) + TWO_RECORDS + END,
    "a hole": bytes([0, OPEN, HELLO, 4, 4, RECORDS, 4, 8, 65]) + A_WHILE,
    "cancelled": bytes([GREETED]) + TWO_RECORDS + bytes([CANCEL]) + A_WHILE + bytes([CANCEL]) + END,
    "shut down": bytes([GREETED | SHUT_DOWN]) + TWO_RECORDS,
    "large, and slowly read": bytes([GREETED | SLOWLY]) + bytes([RECORDS | 48, 0, 248, 248, 248, 248]) * 3,
    "pinged": bytes([GREETED, ODD_FRAME, 0x89, 0, 1, 7, PONG]),
    "in pieces": bytes([0, OPEN, ODD_FRAME, 2, 0, 1, 0, ODD_FRAME, 0x80, 0, 1, 9]),
    "not masked": bytes([0, OPEN, ODD_FRAME, 0x82, 1, 1, 0]),
    "longer than it is": bytes([0, OPEN, ODD_FRAME, 0x82, 6 | 20 << 3, 9]) + b"123456789",
}

# How `index_recovery` reads its input: records, and what happens to which file.
INDEX, LOG, EVENTS, ENDED, OWNER = range(5)
GONE, CHANGED, CUT_OFF, LONGER, ZERO, MOVED, WITHOUT, WITH, OVER, ZEROS, ENTRY = (
    at << 3 for at in (0, 1, 8, 12, 15, 18, 21, 23, 25, 27, 29))
LOGS = {"open": bytes([0, 3, 8, 15, 10, 4 | 64]), "ended, with a hole": bytes([51, 3, 8, 15, 10, 4])}
DAMAGE = {
    "nothing": b"",
    "index gone": bytes([GONE | INDEX]),
    "log gone": bytes([GONE | LOG]),
    "owner gone": bytes([GONE | OWNER]),
    "owner cut": bytes([CUT_OFF | OWNER, 20, 0]),
    "end changed": bytes([CHANGED | ENDED, 40, 0, 1]),
    "end longer": bytes([WITH | ENDED, 30, 0, 1]) + b"9",
    "index changed": bytes([CHANGED | INDEX, 50, 0, 1]),
    "log changed": bytes([CHANGED | LOG, 1, 0, 255]),
    "events cut": bytes([CUT_OFF | EVENTS, 3, 0]),
    "index cut": bytes([CUT_OFF | INDEX, 100, 0]),
    "a page of zeros": bytes([ZERO | INDEX, 40, 0, 30, 0, ZERO | LOG, 0, 0, 4, 0]),
    "an entry moved": bytes([MOVED | INDEX, 48, 0, 9, GONE | ENDED, CUT_OFF | LOG, 0, 0]),
    "an entry twice": bytes([MOVED | INDEX, 48, 0, 2]),
    "bytes in between": bytes([WITH | LOG, 1, 0, 2]) + b"xy" + bytes([WITHOUT | INDEX, 48, 0, 48]),
    "a tail of noise": bytes([LONGER | LOG, 0, 0, 3]) + b"abc" + bytes([ZEROS | INDEX, 0, 0, 60, 0]),
    "an entry of somebody else": bytes([ENTRY | INDEX, 0, 0, 4, 0, 0, 1, 0, 0, 1, 65, 0, 9]),
    "a hole without end": bytes([ENTRY | INDEX, 0, 0, 4, 0, 0, 0, 250, 9]),
}

# How `spool_recovery` reads its input: records, and what happens to which file, by its place in the directory.
LEFT = {
    "nothing": bytes([0, 0]),
    "one": bytes([0, 1, 6]),
    "several": bytes([0, 6, 8, 9 | 16, 10, 12, 6, 3]),
    "not from the first": bytes([130, 3, 8, 8, 8]),
    "the last numbers": bytes([3 | 3 << 2, 4, 8, 8, 8, 8]),
    "large": bytes([0, 3, 14, 14 | 16, 14]),
}
CHANGES = {
    "as it was": b"",
    "first gone": bytes([0, 0, 0, 0]),
    "hello gone": bytes([0, 128, 0, 0]),
    "end changed": bytes([1, 141, 9, 0, 1]),
    "last cut": bytes([3, 3, 30, 0]),
    "first changed": bytes([1, 0, 20, 0, 1]),
    "renamed": bytes([7, 0, 0, 0, 152, 5]),
    "another name": bytes([11, 222, 2, 0, 0, 0, 0]),
    "no end of it": bytes([8, 0, 0, 0]),
    "less than it says": bytes([9, 0, 9, 0, 0]),
    "a message": bytes([10, 0, 0, 0, 3]) + b"\x00\x01\x03",
    "another record": bytes([11, 152, 0, 0, 1, 0, 0, 0]),
}


def main():
    vectors = json.loads(VECTORS.read_bytes())
    for vector in vectors["frames"] + vectors["invalid"]:
        name, side = vector["name"], vector["direction"]
        if "binary" in vector:
            binary = bytes.fromhex(vector["binary"])
            write(f"{side}_binary", name, binary)
            write_session(side, name, 6, binary)
            write_call(side, name, binary)
            if side == "server" and len(binary) < 256:
                write("sender", name, WELCOMED + bytes([5, len(binary)]) + binary + bytes([4]))
        if "json" in vector or "text" in vector:
            text = vector["text"] if "text" in vector else json.dumps(vector["json"], separators=(",", ":"))
            write("json", name, text.encode())
            write_session(side, f"{name}, text", 7, text.encode())
    write("sender", "delivered", WELCOMED + DELIVERED)
    write("sender", "delivered after a cut", WELCOMED + bytes([3, 2, 6, 0, 0, 1, 0, 4]) + DELIVERED)
    for name, text in SCREENS.items():
        write("sanitize", name, bytes([0, 2, 5, 1]) + text.encode())
        for display, flags in (("terminal", 0), ("git", 3)):
            write("lines", f"{name}, {display}", bytes([flags, 3, 10, 0, 7, 200, 1]) + text.encode())
    for name, call in CALLS.items():
        write("handshake", name, call)
    for log, records in LOGS.items():
        for name, damage in DAMAGE.items():
            write("index_recovery", f"{log}, {name}", records + damage)
    for spool, records in LEFT.items():
        write("spool_recovery", spool, records)
    for name, change in CHANGES.items():
        write("spool_recovery", name, LEFT["several"] + change)


def write_call(side, name, frame):
    """The frame behind a hello."""
    if side == "agent" and len(frame) < 256:
        write("handshake", name, bytes([GREETED, FRAME, len(frame)]) + frame)


def write_session(side, name, kind, frame):
    """A hello, then this frame over the connection, a commit and the end."""
    if side == "agent" and len(frame) < 256:
        write("records", name, bytes([0, 1, 0, 0, kind, 0, len(frame)]) + frame + bytes([4, 3, 0, 0, 0, 7]))


def write(program, name, data):
    """The file is named after the example, so that running this again changes nothing."""
    if len(data) <= SHORT:
        corpus = HERE / "corpus" / program
        corpus.mkdir(parents=True, exist_ok=True)
        (corpus / ("example-" + re.sub("[^A-Za-z0-9]+", "-", name))).write_bytes(data)


if __name__ == "__main__":
    main()
