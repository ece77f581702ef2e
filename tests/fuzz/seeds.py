#!/usr/bin/env python3
"""Writes inputs for the fuzzer to start from: the wire's frozen examples, and output as builds write it.

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


def main():
    vectors = json.loads(VECTORS.read_bytes())
    for vector in vectors["frames"] + vectors["invalid"]:
        name, side = vector["name"], vector["direction"]
        if "binary" in vector:
            binary = bytes.fromhex(vector["binary"])
            write(f"{side}_binary", name, binary)
            write_session(side, name, 6, binary)
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
