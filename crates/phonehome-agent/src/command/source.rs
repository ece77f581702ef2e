//! Where the command writes to, and where that is read: two pipes, one, or a terminal.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::process::CommandExt,
    process::Stdio,
};

use bytes::{BufMut, BytesMut, buf::Limit};
use phonehome_proto::frame::Stream;
use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl, fstat},
    io::Errno,
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
    pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt},
    termios::{
        LocalModes, OptionalActions, OutputModes, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize,
    },
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::unix::pipe::Receiver,
};
use tracing::debug;

pub(crate) use super::descendants::Held;
use super::unix;
use crate::config::Window;

/// Where the command writes to.
#[derive(Debug)]
pub(crate) enum Output {
    /// The agent's own standard streams, untouched.
    Inherited,
    /// One pipe for each stream, or the same one for both.
    Pipes(OwnedFd, OwnedFd),
    /// A terminal, which is both streams.
    Terminal(OwnedFd),
}

impl Output {
    /// Makes it the output of a process that will be started.
    pub(super) fn attach(self, process: &mut std::process::Command) -> io::Result<()> {
        unix::prepare_child(process, matches!(self, Self::Terminal(_)));
        match self {
            Self::Inherited => drop(process.process_group(0)),
            Self::Pipes(stdout, stderr) => drop(process.process_group(0).stdout(stdout).stderr(stderr)),
            Self::Terminal(terminal) => {
                if isatty(rustix::stdio::stdin()) {
                    process.stdin(Stdio::null()); // a terminal of another session cannot be read
                }
                process.stdout(terminal.try_clone()?).stderr(terminal);
            }
        }
        Ok(())
    }

    /// What becomes standard output and standard error, if they are not just this process's own.
    pub(super) fn ends(&self) -> Option<[BorrowedFd<'_>; 2]> {
        match self {
            Self::Inherited => None,
            Self::Pipes(stdout, stderr) => Some([stdout.as_fd(), stderr.as_fd()]),
            Self::Terminal(terminal) => Some([terminal.as_fd(), terminal.as_fd()]),
        }
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ends().into_iter().flatten()
    }
}

/// The reading ends of what the command writes.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(crate) stdout: Source,
    /// None when both streams are one.
    pub(crate) stderr: Option<Source>,
    /// The command's end of a terminal. As long as the command lives it must stay open: when the last one is closed, the
    /// terminal is gone, and who has it as controlling terminal gets SIGHUP.
    pub(crate) kept_open: Option<OwnedFd>,
}

/// Capacity asked for a pipe, bytes: the most an unprivileged process gets (pipe(7), `/proc/sys/fs/pipe-max-size`).
pub(crate) const PIPE_SIZE: usize = 1024 * 1024;

impl Sources {
    /// Makes the pipes before the command exists, so that not even its first byte can be missed.
    pub(crate) fn pipes(merge: bool) -> io::Result<(Output, Self)> {
        let (stdout, stdout_end) = pipe()?;
        if merge {
            let output = Output::Pipes(stdout_end.try_clone()?, stdout_end);
            return Ok((output, Self { stdout, stderr: None, kept_open: None }));
        }
        let (stderr, stderr_end) = pipe()?;
        Ok((Output::Pipes(stdout_end, stderr_end), Self { stdout, stderr: Some(stderr), kept_open: None }))
    }

    /// Makes a terminal. What the command writes is read as it was written: the terminal turns no LF into CR LF, and
    /// echoes nothing.
    pub(crate) fn terminal(size: Option<Window>) -> io::Result<(Output, Self)> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let mut modes = tcgetattr(&slave)?;
        modes.output_modes.remove(OutputModes::ONLCR);
        modes.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&slave, OptionalActions::Now, &modes)?;
        fcntl_setfl(&master, fcntl_getfl(&master)? | OFlags::NONBLOCK)?;
        let terminal = Terminal(unix::readable(master)?);
        terminal.resize(size)?;
        let kept_open = Some(slave.try_clone()?);
        Ok((Output::Terminal(slave), Self { stdout: Source::Terminal(terminal), stderr: None, kept_open }))
    }

    /// How descriptors of it are recognised.
    pub(crate) fn held(&self) -> Vec<Held> {
        let both = [(Stream::Stdout, Some(&self.stdout)), (Stream::Stderr, self.stderr.as_ref())];
        let links = both.into_iter().filter_map(|(stream, source)| Some((stream, source?.link()?)));
        links.map(|(stream, link)| Held { streams: vec![stream], link }).collect()
    }
}

fn pipe() -> io::Result<(Source, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    if let Err(errno) = fcntl_setpipe_size(&reader, PIPE_SIZE) {
        debug!("the pipe keeps its default size: {errno}");
    }
    Ok((Source::Pipe(Receiver::from_owned_fd(reader)?), writer))
}

/// Something that the command's output is read from.
#[derive(Debug)]
pub(crate) enum Source {
    Pipe(Receiver),
    Terminal(Terminal),
}

/// The master of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    /// Without a size it gets that of this process's own terminal, if it has one.
    fn resize(&self, size: Option<Window>) -> io::Result<()> {
        let own = || tcgetwinsize(rustix::stdio::stdout()).ok().filter(|own| own.ws_col > 0 && own.ws_row > 0);
        let fixed = |size: Window| Winsize { ws_col: size.columns, ws_row: size.rows, ws_xpixel: 0, ws_ypixel: 0 };
        let size = size.map(fixed).or_else(own).unwrap_or_else(|| fixed(Window::default()));
        Ok(tcsetwinsize(self.0.get_ref(), size)?)
    }
}

impl Source {
    /// Waits for something to read, or for the end.
    pub(crate) async fn readable(&self) {
        match self {
            Self::Pipe(pipe) => drop(pipe.readable().await), // an error shows again in the read that follows
            Self::Terminal(Terminal(terminal)) => drop(terminal.readable().await), // likewise
        }
    }

    /// Reads what is there; 0 at the end. A terminal that nobody has open any more reads as an error (EIO), which is its
    /// end.
    pub(crate) fn try_read(&self, buffer: &mut Limit<&mut BytesMut>) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.try_read_buf(buffer),
            Self::Terminal(Terminal(terminal)) => {
                match terminal.try_io(Interest::READABLE, |master| read_terminal(master, buffer)) {
                    Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(0),
                    result => result,
                }
            }
        }
    }

    /// Whether gathering several writes before a read pays: not on a terminal, which holds 4 KiB.
    pub(crate) fn gathers(&self) -> bool {
        matches!(self, Self::Pipe(_))
    }

    fn link(&self) -> Option<String> {
        match self {
            Self::Pipe(pipe) => Some(format!("pipe:[{}]", fstat(pipe).ok()?.st_ino)),
            Self::Terminal(Terminal(terminal)) => ptsname(terminal, Vec::new()).ok()?.into_string().ok(),
        }
    }
}

/// At most what a terminal holds, by way of the stack.
fn read_terminal(master: &OwnedFd, buffer: &mut Limit<&mut BytesMut>) -> io::Result<usize> {
    let mut block = [0; TERMINAL_SIZE];
    let room = buffer.remaining_mut().min(TERMINAL_SIZE);
    let count = rustix::io::read(master, &mut block[..room])?;
    buffer.put_slice(&block[..count]);
    Ok(count)
}

/// Bytes that a terminal holds for its reader (pty(7), the line discipline's buffer).
const TERMINAL_SIZE: usize = 4096;

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Pipe(pipe) => pipe.as_fd(),
            Self::Terminal(Terminal(terminal)) => terminal.as_fd(),
        }
    }
}
