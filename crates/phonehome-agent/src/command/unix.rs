//! System calls for which no safe wrapper exists: signals of every number, a child's terminal, resource use, and
//! overwriting a secret in the environment.
#![expect(unsafe_code, reason = "each call is documented with why it is sound")]

use std::{
    ffi::{CStr, CString, OsString, c_char, c_int, c_short},
    io,
    mem::{self, MaybeUninit},
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, process::CommandExt},
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
    block_all()?;
    let default = [0u64; KERNEL_SIGACTION];
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: for the kernel's sigaction, which is plain data, zeroes are valid and mean the default; its signal set is 64
    // bits; every pointer is to something that outlives its call and is large enough. No handler is installed, so no code
    // runs in a signal's context. A descriptor that signalfd returns is nobody else's.
    unsafe {
        for number in 1..=LAST_SIGNAL {
            // It fails for KILL and STOP only.
            libc::syscall(libc::SYS_rt_sigaction, number, default.as_ptr(), ptr::null_mut::<u64>(), KERNEL_SIGSET);
        }
        let descriptor = libc::syscall(libc::SYS_signalfd4, -1, &raw const ALL, KERNEL_SIGSET, flags) as RawFd;
        if descriptor < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(descriptor)) }
    }
}

/// Blocks every signal in this thread.
///
/// Not by way of the libc, which denies that it has a few signals of its own and leaves them out: sent by anybody, they
/// would end this process. It needs them for nothing done here (pthread_cancel(3), setuid(2) with several threads).
pub(super) fn block_all() -> io::Result<()> {
    let (how, none) = (libc::SIG_BLOCK, ptr::null_mut::<u64>());
    // SAFETY: the kernel's signal set is 64 bits, and the old one is not asked for (rt_sigprocmask(2)).
    let done = unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const ALL, none, KERNEL_SIGSET) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Every signal, in the kernel's form.
static ALL: u64 = u64::MAX;

/// The highest signal number of Linux, generic numbering (signal(7), `SIGRTMAX`).
const LAST_SIGNAL: c_int = 64;

/// Size of the kernel's `struct sigaction` on 64-bit machines, in words: handler, flags, restorer, mask.
const KERNEL_SIGACTION: usize = 4;

/// Size of the kernel's signal set, bytes (rt_sigaction(2), `sigsetsize`).
const KERNEL_SIGSET: usize = 8;

/// pthread_sigmask(3) returns its error.
fn check(error: c_int) -> io::Result<()> {
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Registers a descriptor with the runtime, for reading.
pub(crate) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is the same open descriptor from here until it is dropped, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

/// A signal by its number. `None` for a number that is no signal's.
pub(super) fn signal(number: u8) -> Option<Signal> {
    // SAFETY: the number is in the kernel's range. Signals that a libc keeps for itself are never caught or blocked by this
    // value: it is passed on to other processes, or names the signal that the kernel sends here when the parent dies, which
    // is blocked like all others (`block_all`) and read as data.
    (1..=LAST_SIGNAL).contains(&c_int::from(number)).then(|| unsafe { Signal::from_raw_unchecked(number.into()) })
}

/// Has a child that the standard library will start begin with no signal blocked and, if it `leads_session`, in a
/// session of its own, whose controlling terminal is its standard output. That must be a terminal then.
pub(super) fn prepare_child(process: &mut Command, leads_session: bool) {
    let prepare = move || {
        if leads_session {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdout())?;
        }
        let none = no_signals();
        // SAFETY: the pointer is to a local.
        check(unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) })
    };
    // SAFETY: between fork and exec it makes a few system calls, allocates nothing and takes no lock.
    unsafe {
        process.pre_exec(prepare);
    }
}

fn no_signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data for which zeroes are valid: the empty set.
    unsafe { mem::zeroed() }
}

/// The two signals below the first real-time one: glibc's posix_spawn ignores them in the child unless they are asked for,
/// which sigaddset(3) refuses to do.
fn kept_by_libc() -> libc::sigset_t {
    const KEPT: u64 = 1 << 31 | 1 << 32;
    let mut set = no_signals();
    // SAFETY: a sigset_t is at least as large as the kernel's 64 bits, which are its beginning (sigset_t in either libc).
    unsafe { (&raw mut set).cast::<u64>().write_unaligned(KEPT) };
    set
}

/// Starts a program in a process group of its own with no signal blocked, without a copy of this process in between
/// (posix_spawn(3)): that would cost more than all the rest of a short supervision. `outputs` become its standard output and
/// standard error; without them it has this process's.
pub(super) fn spawn(
    command: &[OsString],
    environment: &[OsString],
    outputs: Option<[BorrowedFd<'_>; 2]>,
) -> io::Result<Pid> {
    let arguments = Strings::new(command)?;
    let variables = Strings::new(environment)?;
    let program = *arguments.pointers.first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut attributes = MaybeUninit::uninit();
    let mut actions = MaybeUninit::uninit();
    let mut child = 0;
    let none = no_signals();
    let kept_by_libc = kept_by_libc();
    // SAFETY: both objects are initialised before anything else is done with them and destroyed once; none of the calls
    // keeps a pointer beyond its return but those to copies that the objects own. The lists of strings end with a null
    // pointer and outlive the call.
    unsafe {
        check(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
        let mut attributes = attributes.assume_init();
        check(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
        let mut actions = actions.assume_init();
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF | libc::POSIX_SPAWN_SETPGROUP;
        let mut result = check(libc::posix_spawnattr_setflags(&raw mut attributes, flags as c_short))
            .and_then(|()| check(libc::posix_spawnattr_setpgroup(&raw mut attributes, 0)))
            .and_then(|()| check(libc::posix_spawnattr_setsigmask(&raw mut attributes, &raw const none)))
            .and_then(|()| check(libc::posix_spawnattr_setsigdefault(&raw mut attributes, &raw const kept_by_libc)));
        for (output, at) in outputs.iter().flatten().zip([libc::STDOUT_FILENO, libc::STDERR_FILENO]) {
            result = result
                .and_then(|()| check(libc::posix_spawn_file_actions_adddup2(&raw mut actions, output.as_raw_fd(), at)));
        }
        let result = result.and_then(|()| {
            check(libc::posix_spawnp(
                &raw mut child,
                program,
                &raw const actions,
                &raw const attributes,
                arguments.pointers.as_ptr().cast(),
                variables.pointers.as_ptr().cast(),
            ))
        });
        libc::posix_spawn_file_actions_destroy(&raw mut actions);
        libc::posix_spawnattr_destroy(&raw mut attributes);
        drop(block_all()); // musl's posix_spawn unblocks its own signals here; as at the start, this does not fail
        result?;
    }
    Pid::from_raw(child).ok_or_else(|| io::ErrorKind::Other.into())
}

/// Strings as a program gets them: pointers that end with a null pointer.
struct Strings {
    pointers: Vec<*const c_char>,
    /// What they point to.
    _strings: Vec<CString>,
}

impl Strings {
    fn new(strings: &[OsString]) -> io::Result<Self> {
        let strings: Vec<CString> =
            strings.iter().map(|string| CString::new(string.as_bytes())).collect::<Result<_, _>>()?;
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Ok(Self { pointers, _strings: strings })
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

/// Removes an environment variable and returns its value. Every value of that name is overwritten where the kernel put it:
/// there may be several (execve(2)), of which the first counts.
///
/// Otherwise it stays readable in this process's memory, and in `/proc/PID/environ`, for its whole life.
///
/// # Safety
///
/// This process has one thread, and nobody holds a pointer into the environment.
pub(super) unsafe fn take_variable(name: &CStr) -> Option<Zeroizing<Vec<u8>>> {
    let mut first = None;
    // SAFETY: by the contract nobody else reads or changes the environment. It is a list of pointers that ends with a null
    // pointer, or none at all, to NUL-terminated strings in the process's own writable memory (environ(7)), of which
    // exactly bytes before the NUL are read and written. unsetenv(3) removes every entry of that name.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            if let Some(at) = value_of(name, CStr::from_ptr(*entry).to_bytes()) {
                let value = wiped((*entry).add(at));
                first.get_or_insert(value);
            }
            entry = entry.add(1);
        }
        libc::unsetenv(name.as_ptr());
    }
    first
}

unsafe extern "C" {
    /// The environment (environ(7)).
    static mut environ: *mut *mut c_char;
}

/// Where the value starts in an entry of the environment, if it is one of this name.
fn value_of(name: &CStr, entry: &[u8]) -> Option<usize> {
    let rest = entry.strip_prefix(name.to_bytes())?;
    rest.starts_with(b"=").then(|| name.count_bytes() + 1)
}

/// Copies a string and overwrites it.
///
/// # Safety
///
/// It is NUL-terminated and writable, and nobody else uses it.
unsafe fn wiped(string: *mut c_char) -> Zeroizing<Vec<u8>> {
    // SAFETY: by the contract; no byte from the NUL on is written.
    unsafe {
        let taken = Zeroizing::new(CStr::from_ptr(string).to_bytes().to_vec());
        for at in 0..taken.len() {
            string.add(at).write_volatile(0);
        }
        taken
    }
}

/// Sends a signal of any number to every member of a process group.
pub(super) fn kill_group(group: Pid, number: u8) -> io::Result<()> {
    let signal = signal(number).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::kill_process_group(group, signal)?)
}

/// Sends a signal of any number to a process.
pub(super) fn kill(process: Pid, number: u8) -> io::Result<()> {
    let signal = signal(number).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::process::kill_process(process, signal)?)
}
