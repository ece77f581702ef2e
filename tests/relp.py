#!/usr/bin/env python3
"""rsyslog's RELP and phonehome, side by side, over a link that is cut again and again.

    python3 tests/relp.py

The same numbered lines go the same way twice: from a sender, through a proxy that breaks the connection with a reset,
to a file. RELP is the nearest thing to what phonehome promises: it acknowledges every message, too. After a cut it
sends again whatever was not confirmed, under new numbers, so that its receiver stores some of it twice. phonehome has
to come out with nothing lost and nothing repeated, byte for byte.

Both get the same link: the same bandwidth, and cuts after the same numbers of bytes, which follow from the seed.
rsyslog is set up so that it does its best: queues that hold all lines, endless retries, a second between them, and no
stalls by delayed TCP acknowledgements. It runs as two private processes with files in a temporary directory; the
system's own is not touched. Where rsyslog or its RELP module is missing (Debian: rsyslog, rsyslog-relp), only phonehome
runs.

Variables, with their defaults:

    LINES=200000   lines to send
    CUTS=30        cuts of the link
    SEED=1         where they are
    RATE=8         bandwidth of the link, MB/s
    LIMIT=300      longest that one of the two may take, seconds

Columns: lines sent and stored; lines lost; stored lines that were repeated; lines whose first copy came after that of a
later line; cuts of the link; seconds until the last line was stored.

Needs Rust and Python 3.8. Exit status: 0 phonehome lost and repeated nothing and every cut happened, 1 otherwise.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

TOP = pathlib.Path(__file__).resolve().parent.parent

# What the proxy passes on at once, bytes: small enough that the bandwidth is even.
BLOCK = 16 << 10

# How often progress is looked at, seconds.
TICK = 0.02

# How long nothing may be added to RELP's file before it is taken for finished: longer than any retry, seconds.
QUIET = 4


def main():
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(__doc__.strip())
        return 0
    if sys.argv[1:]:
        sys.exit("relp.py: no arguments are known, see --help")
    task = Task()
    programs = build_programs()
    with tempfile.TemporaryDirectory(prefix="phonehome-relp.") as scratch:
        try:
            return asyncio.run(compare(task, programs, pathlib.Path(scratch)))
        except asyncio.CancelledError:
            return 1


async def compare(task, programs, scratch):
    for signal_number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signal_number, asyncio.current_task().cancel)
    lines = scratch / "lines"
    lines.write_bytes(task.text)
    print(f"{task.lines} lines, {len(task.text) / 1e6:.1f} MB, {task.cuts} cuts, seed {task.seed}, {task.rate} MB/s\n")
    print(f"{'':<14}{'sent':>9}{'stored':>9}{'lost':>9}{'repeated':>9}{'disorder':>9}{'cuts':>6}{'seconds':>9}")
    complaints = []
    if missing := rsyslog_is_missing():
        print(f"{'rsyslog RELP':<14}  skipped: not installed ({missing})")
    else:
        relp = await Relp(task, lines, scratch / "relp").run()
        relp.show("rsyslog RELP")
        if relp.cuts < task.cuts:
            complaints.append(f"only {relp.cuts} cuts for RELP")
    ours = await Phonehome(task, lines, scratch / "phonehome", programs).run()
    ours.show("phonehome")
    if ours.cuts < task.cuts:
        complaints.append(f"only {ours.cuts} cuts for phonehome")
    if not ours.is_exact:
        complaints.append("what phonehome stored is not what was sent")
    complaints += ours.complaints
    for complaint in complaints:
        print(f"relp.py: {complaint}", file=sys.stderr)
    return 1 if complaints else 0


class Task:
    """What is to be sent, and what happens on the way."""

    def __init__(self):
        self.lines = number("LINES", 200_000)
        self.cuts = number("CUTS", 30)
        self.seed = number("SEED", 1)
        self.rate = number("RATE", 8)
        self.limit = number("LIMIT", 300)
        self.text = b"".join(line(count) for count in range(self.lines))
        if self.cuts and len(self.text) < self.cuts * BLOCK:
            sys.exit(f"relp.py: {self.lines} lines are too few for {self.cuts} cuts")

    def cut_points(self):
        """Bytes after which the link is cut, all of them before the lines alone could be through."""
        gaps = random.Random(self.seed)
        gaps = [gaps.uniform(0.3, 1.7) for _ in range(self.cuts)]
        scale = 0.95 * len(self.text) / sum(gaps) if gaps else 0
        points, at = [], 0.0
        for gap in gaps:
            at += gap * scale
            points.append(int(at))
        return points


def number(name, default):
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        sys.exit(f"relp.py: {name} is not a number: {value}")
    return int(value)


def line(count):
    """As long as a compiler's."""
    return b"line %09d %s\n" % (count, bytes(97 + (count * step) % 26 for step in range(1, 61)))


class Result:
    """What a receiver stored, held against what was sent."""

    def __init__(self, task, stored, cuts, seconds, complaints=()):
        known = {text: count for count, text in enumerate(task.text.splitlines(keepends=True))}
        self.sent = task.lines
        self.is_exact = stored == task.text
        stored = stored.splitlines(keepends=True)
        self.stored = len(stored)
        self.repeated = self.disorder = 0
        seen = set()
        latest = -1
        for text in stored:
            count = known.get(text)
            if count in seen:
                self.repeated += 1
            elif count is not None:
                seen.add(count)
                self.disorder += count < latest
                latest = max(latest, count)
        self.lost = self.sent - len(seen)
        self.cuts = cuts
        self.seconds = seconds
        self.complaints = list(complaints)

    def show(self, name):
        print(
            f"{name:<14}{self.sent:>9}{self.stored:>9}{self.lost:>9}{self.repeated:>9}{self.disorder:>9}"
            f"{self.cuts:>6}{self.seconds:>9.1f}",
            flush=True,
        )


# --- The two ways ---


class Relp:
    """omrelp -> link -> imrelp."""

    def __init__(self, task, lines, scratch):
        self.task, self.lines, self.scratch = task, lines, scratch
        scratch.mkdir()
        self.stored = scratch / "stored"

    async def run(self):
        async with contextlib.AsyncExitStack() as stack:
            port = free_port()
            receiver = await stack.enter_async_context(self.rsyslogd("receiver", self.receiver_settings(port)))
            await listening(port, receiver)
            link = await stack.enter_async_context(Link(self.task, port))
            start = time.monotonic()
            await stack.enter_async_context(self.rsyslogd("sender", self.sender_settings(link.port)))
            seconds = await self.last_line() - start
            # Stopped before it is read: what the receiver may still hold is written by then.
            await stack.aclose()
            return Result(self.task, self.stored.read_bytes(), link.cuts, seconds)

    async def last_line(self):
        """When the file stopped growing, once it can be complete."""
        give_up = time.monotonic() + self.task.limit
        size, changed = -1, time.monotonic()
        while time.monotonic() < give_up:
            await asyncio.sleep(TICK)
            now = self.stored.stat().st_size if self.stored.exists() else 0
            if now != size:
                size, changed = now, time.monotonic()
            elif size >= len(self.task.text) and time.monotonic() - changed > QUIET:
                break
        return changed

    def sender_settings(self, port):
        queue = f'queue.type="LinkedList" queue.size="{2 * self.task.lines + 10_000}" queue.timeoutEnqueue="600000"'
        return f"""
            module(load="imfile")
            module(load="omrelp")
            main_queue({queue})
            template(name="line" type="string" string="<13>1 - - build - - - %msg%")
            input(type="imfile" file="{self.lines}" tag="build" ruleset="out")
            ruleset(name="out" {queue}) {{
                action(type="omrelp" target="127.0.0.1" port="{port}" template="line" timeout="5" conn.timeout="5"
                       action.resumeRetryCount="-1" action.resumeInterval="1" action.resumeIntervalMax="1" {queue})
            }}
        """

    def receiver_settings(self, port):
        return f"""
            module(load="imrelp")
            template(name="line" type="string" string="%msg%\\n")
            input(type="imrelp" address="127.0.0.1" port="{port}" ruleset="in")
            ruleset(name="in" queue.type="LinkedList" queue.size="{2 * self.task.lines + 10_000}") {{
                action(type="omfile" file="{self.stored}" template="line")
            }}
        """

    def rsyslogd(self, name, settings):
        work = self.scratch / name
        work.mkdir()
        config = work / "rsyslog.conf"
        config.write_text(f'global(workDirectory="{work}")\n{settings}')
        command = [rsyslogd(), "-n", "-f", str(config), "-i", str(work / "pid")]
        return running(command, work / "own.log")


class Phonehome:
    """phonehome-agent -> link -> phonehome-server hook."""

    def __init__(self, task, lines, scratch, programs):
        self.task, self.lines, self.scratch, self.programs = task, lines, scratch, programs
        scratch.mkdir()

    async def run(self):
        async with contextlib.AsyncExitStack() as stack:
            port = free_port()
            link = await stack.enter_async_context(Link(self.task, port))
            stack.callback(self.stop_agent)
            start = time.monotonic()
            stored = stack.enter_context(open(self.scratch / "stored", "wb"))
            log = self.scratch / "hook.log"
            hook = await stack.enter_async_context(running(self.hook(port, link.port), log, stored))
            complaints = []
            try:
                code = await asyncio.wait_for(hook.wait(), self.task.limit)
            except asyncio.TimeoutError:
                complaints.append(f"phonehome is not through after {self.task.limit} s")
            else:
                if code != 0 or b"the log is complete" not in log.read_bytes():
                    complaints.append(f"the hook exited with {code}: {log.read_text()}")
            seconds = time.monotonic() - start
            return Result(self.task, (self.scratch / "stored").read_bytes(), link.cuts, seconds, complaints)

    def hook(self, port, link):
        """The launcher starts the builder as one far away: with none of the hook's streams."""
        launcher = '"$1" --tee off -- cat "$2" </dev/null >"$3/agent.log" 2>&1 & echo $! >"$3/agent.pid"'
        address = ["--listen", f"127.0.0.1:{port}", "--advertise", f"127.0.0.1:{link}", "--no-tls"]
        arguments = [self.programs["phonehome-agent"], str(self.lines), str(self.scratch)]
        hook = [self.programs["phonehome-server"], "hook", *address, "--render", "raw"]
        return [*hook, "--", "sh", "-c", launcher, "launcher", *arguments]

    def stop_agent(self):
        """Not a child of this program, and gone by itself unless something went wrong."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.scratch / "agent.pid").read_text())
            if pathlib.Path(f"/proc/{pid}/comm").read_text() == "phonehome-agent\n":
                os.kill(pid, signal.SIGKILL)


# --- The link ---


class Link:
    """A TCP proxy of limited bandwidth that breaks its connection where the task says, both sides with a reset.

    What counts are the bytes towards the receiver, over all connections.
    """

    def __init__(self, task, target):
        self.target = target
        self.rate = task.rate * 1e6
        self.points = task.cut_points()
        self.cuts = 0
        self.carried = 0
        self.free_at = 0.0
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.connected, "127.0.0.1", 0, limit=BLOCK)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def connected(self, reader, writer):
        task = asyncio.current_task()
        self.tasks.add(task)
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target, limit=BLOCK)
            writers.append(far_writer)
            near, far = (each.get_extra_info("socket") for each in writers)
            halves = [self.forth(reader, near, far_writer), self.back(far_reader, far, writer)]
            halves = [asyncio.ensure_future(half) for half in halves]
            try:
                await asyncio.wait(halves, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for half in halves:
                    half.cancel()
                await asyncio.gather(*halves, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # nobody listens and the caller sees a reset, or all is over
        finally:
            for each in writers:
                reset(each)
            self.tasks.discard(task)

    async def forth(self, reader, near, writer):
        while True:
            block = await reader.read(BLOCK)
            confirm_at_once(near)
            if not block:
                return await self.end(writer)
            until_cut = self.points[self.cuts] - self.carried if self.cuts < len(self.points) else len(block) + 1
            passed = block[:until_cut]
            await self.take_time(len(passed))
            writer.write(passed)
            await writer.drain()
            self.carried += len(passed)
            if until_cut <= len(block):
                self.cuts += 1
                return None

    async def back(self, reader, far, writer):
        while block := await reader.read(BLOCK):
            confirm_at_once(far)
            writer.write(block)
            await writer.drain()
        await self.end(writer)

    async def take_time(self, size):
        """Waits as long as a link of this bandwidth takes."""
        now = time.monotonic()
        self.free_at = max(self.free_at, now) + size / self.rate
        await asyncio.sleep(self.free_at - now)

    @staticmethod
    async def end(writer):
        """Passes an orderly end on; the other direction may go on for a while."""
        writer.write_eof()
        await asyncio.sleep(1)


def confirm_at_once(connection):
    """Has the kernel confirm what was read (tcp(7), TCP_QUICKACK, which does not last).

    RELP's answers are small writes, of which the second waits until the first is confirmed: a proxy that leaves that to
    the kernel's 40 ms makes RELP ten times slower than it is.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def reset(writer):
    """Closes with a reset (socket(7), SO_LINGER)."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


# --- What they lean on ---


def build_programs():
    """Cargo says where it puts them, whatever its settings are."""
    command = ["cargo", "build", "--locked", "--release", "-p", "phonehome-agent", "-p", "phonehome-server"]
    command += ["--quiet", "--message-format", "json-render-diagnostics"]
    built = subprocess.run(command, cwd=TOP, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if built.returncode != 0:
        sys.exit("relp.py: the programs cannot be built")
    artifacts = (json.loads(message) for message in built.stdout.splitlines())
    paths = (artifact["executable"] for artifact in artifacts if artifact.get("executable"))
    return {os.path.basename(path): path for path in paths}


def rsyslogd():
    return shutil.which("rsyslogd", path=os.environ.get("PATH", "") + ":/usr/sbin")


def rsyslog_is_missing():
    """What of it is not there, if anything."""
    if rsyslogd() is None:
        return "rsyslog"
    modules = [module for lib in ("/usr/lib", "/usr/lib64") for module in pathlib.Path(lib).glob("**/rsyslog/*relp.so")]
    return None if {module.name for module in modules} >= {"imrelp.so", "omrelp.so"} else "rsyslog-relp"


@contextlib.asynccontextmanager
async def running(command, log, stdout=None):
    """A process that is gone at the end, first asked, then killed."""
    with open(log, "wb") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=stdout or errors, stderr=errors
        )
    try:
        yield process
    finally:
        for stop, patience in ((process.terminate, 20), (process.kill, 20)):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    stop()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), patience)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def listening(port, process):
    """Waits until somebody does."""
    for _ in range(int(20 / TICK)):
        if process.returncode is not None:
            break
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(TICK)
    sys.exit("relp.py: rsyslogd does not listen")


if __name__ == "__main__":
    sys.exit(main())
