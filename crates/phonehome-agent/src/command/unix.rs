//! System calls for which no safe wrapper exists: signals of every number, a child's terminal, resource use, and
//! overwriting a secret in the environment.
#![expect(unsafe_code, reason = "each call is documented with why it is sound")]

use std::{
    ffi::{CStr, c_char, c_int},
    io, mem,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
    ptr,
    time::Duration,
};

use rustix::process::{Pid, Signal};
use tokio::io::{Interest, unix::AsyncFd};
use zeroize::Zeroizing;

/// Blocks every signal that can be blocked, in this thread and those it will start, and returns a descriptor to read
/// them from (signalfd(2)). Dispositions become the default ones, and so they will be for a command, also when this
/// process was started with some of them ignored.
///
/// A blocked signal waits, also for a PID 1, which otherwise would never see one without a handler.
pub(super) fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: sigset_t and sigaction are plain data for which zeroes are valid; every pointer is to a local that
    // outlives its call. No handler is installed, so no code runs in a signal's context.
    unsafe {
        let mut default: libc::sigaction = mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for number in 1..=LAST_SIGNAL {
            libc::sigaction(number, &raw const default, ptr::null_mut()); // fails for KILL, STOP and those of the libc
        }
        let mut all: libc::sigset_t = mem::zeroed();
        libc::sigfillset(&raw mut all);
        check(libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, ptr::null_mut()))?;
        let descriptor = libc::signalfd(-1, &raw const all, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if descriptor < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(descriptor)) }
    }
}

/// The highest signal number of Linux, generic numbering (signal(7), `SIGRTMAX`).
const LAST_SIGNAL: c_int = 64;

/// pthread_sigmask(3) returns its error.
fn check(error: c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Registers a descriptor with the runtime, for reading.
pub(super) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor from here until it is dropped, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

/// A signal by its number. `None` for a number that is no signal's.
pub(super) fn signal(number: u8) -> Option<Signal> {
    // SAFETY: the number is in the kernel's range. Signals that a libc keeps for itself are only ever passed on to
    // other processes here, never caught or blocked by this value.
    (1..=LAST_SIGNAL).contains(&c_int::from(number)).then(|| unsafe { Signal::from_raw_unchecked(number.into()) })
}

/// Has the child begin with no signal blocked and, if it `leads_session`, in a session of its own, whose controlling
/// terminal is its standard output. That must be a terminal then.
pub(super) fn prepare_child(process: &mut Command, leads_session: bool) {
    let prepare = move || {
        if leads_session {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdout())?;
        }
        // SAFETY: as in `block_signals`.
        unsafe {
            let none: libc::sigset_t = mem::zeroed();
            check(libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()))
        }
    };
    // SAFETY: between fork and exec it makes a few system calls, allocates nothing and takes no lock.
    unsafe {
        process.pre_exec(prepare);
    }
}

/// What the descendants of this process used that have been waited for, by it or by one another.
pub(super) struct Used {
    pub(super) user: Duration,
    pub(super) system: Duration,
    /// Largest resident set of one process, bytes.
    pub(super) max_rss: u64,
}

pub(super) fn used_by_children() -> Used {
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    // SAFETY: rusage is plain data for which zeroes are valid; the pointer is to a local. With a valid `who` the call
    // cannot fail (getrusage(2)).
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage);
        usage
    };
    Used { user: time(usage.ru_utime), system: time(usage.ru_stime), max_rss: usage.ru_maxrss.unsigned_abs() * 1024 }
}

/// Marks every descriptor but the standard ones as to be closed when a command is started, whoever opened it.
pub(super) fn close_on_exec() {
    const FIRST: libc::c_uint = 3;
    // SAFETY: with CLOSE_RANGE_CLOEXEC nothing is closed here, only flags are set (close_range(2)).
    let done = unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 {
        return;
    }
    // An older kernel. Nobody hands over higher ones by accident.
    for descriptor in 3..1024 as RawFd {
        // SAFETY: fcntl with F_SETFD changes a flag of a descriptor, or fails when there is none of that number.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Removes an environment variable and returns its value, which is overwritten where the kernel put it.
///
/// Otherwise it stays readable in this process's memory, and in `/proc/PID/environ`, for its whole life. To be called
/// before any thread is started.
pub(super) fn take_variable(name: &CStr) -> Option<Zeroizing<Vec<u8>>> {
    // SAFETY: there is one thread, so nobody else reads or changes the environment. getenv returns a pointer to the
    // NUL-terminated value within the process's own writable memory (environ(7)), of which exactly the bytes before the
    // NUL are read and written.
    unsafe {
        let value: *mut c_char = libc::getenv(name.as_ptr());
        if value.is_null() {
            return None;
        }
        let taken = Zeroizing::new(CStr::from_ptr(value).to_bytes().to_vec());
        for at in 0..taken.len() {
            value.add(at).write_volatile(0);
        }
        libc::unsetenv(name.as_ptr());
        Some(taken)
    }
}

/// Sends a signal of any number to every member of a process group.
pub(super) fn kill_group(group: Pid, number: u8) -> io::Result<()> {
    let signal = signal(number).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::kill_process_group(group, signal)?)
}
