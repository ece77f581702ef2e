//! What the pusher sees: every stream of the build, the launcher's output and the hook's own lines, on two descriptors.

use std::{collections::BTreeMap, os::fd::BorrowedFd};

use bytes::Bytes;
use phonehome_proto::{frame::Stream, id::StepName};
use rustix::{fs::fstat, stdio, termios::isatty};
use tokio::time::Instant;

use super::{
    outlet::is_pipe,
    render::{LinePrinter, Render, Sanitizer, Style},
};

/// What was asked of `--render`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RenderChoice {
    /// As the descriptor and git's presence suggest.
    Auto {
        /// Whether git started this process as a hook.
        under_git: bool,
    },
    Raw,
    Safe,
}

/// A yes or no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Choice {
    Yes,
    No,
}

/// Which of the hook's descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    Stdout,
    Stderr,
}

/// Whose bytes these are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    Build(StepName, Target),
    Launcher,
}

/// Turns what happens into bytes for each descriptor.
#[derive(Debug)]
pub(crate) struct Screen {
    modes: [Render; 2],
    /// Whether both descriptors lead to the same place, as under git: then one carries everything, or they would cut into
    /// each other's lines.
    joined: bool,
    color: bool,
    prefixes: bool,
    tracts: BTreeMap<Source, Tract>,
    /// Whether the last byte written to each descriptor ended a line; only for raw ones.
    at_start: [bool; 2],
    out: [Vec<u8>; 2],
}

/// One source's way to its descriptor.
#[derive(Debug)]
enum Tract {
    /// With a prefix a line is written when it is whole, so that no other step cuts into it; one that is longer than
    /// [`LONGEST_HELD`] is written in parts.
    Raw {
        prefix: Vec<u8>,
        held: Vec<u8>,
        within_line: bool,
    },
    Safe(Box<Safe>),
}

/// Bytes of a line without an end that are held back for the rest of it.
const LONGEST_HELD: usize = 8 * 1024;

/// What makes one source's bytes fit for a person's terminal.
#[derive(Debug)]
struct Safe {
    sanitizer: Sanitizer,
    lines: LinePrinter,
    clean: Vec<u8>,
}

impl Screen {
    pub(crate) fn open(choice: RenderChoice, color: Choice, prefixes: bool) -> Self {
        let modes = [mode(choice, stdio::stdout()), mode(choice, stdio::stderr())];
        let joined = is_same(stdio::stdout(), stdio::stderr());
        Self { joined, ..Self::new(modes, color == Choice::Yes, prefixes) }
    }

    fn new(modes: [Render; 2], color: bool, prefixes: bool) -> Self {
        let out = [Vec::new(), Vec::new()];
        Self { modes, joined: false, color, prefixes, tracts: BTreeMap::new(), at_start: [true; 2], out }
    }

    /// Whether a person watches, as far as one can tell.
    pub(super) fn is_watched(&self) -> bool {
        self.modes[1] != Render::Raw
    }

    /// Shows a block of output.
    pub(super) fn show(&mut self, source: Source, block: &[u8], now: Instant) {
        let at = self.target(&source) as usize;
        self.interrupt_others(&source);
        let prefixes = self.prefixes;
        let (mode, color) = (self.modes[at], self.color);
        let tract =
            self.tracts.entry(source).or_insert_with_key(|source| Tract::new(mode, color, prefix(source, prefixes)));
        let start = self.out[at].len();
        tract.push(block, now, &mut self.out[at]);
        if let (Render::Raw, Some(last)) = (mode, self.out[at][start..].last()) {
            self.at_start[at] = *last == b'\n';
        }
    }

    /// Shows a line of the hook's own on standard error.
    pub(super) fn own_line(&mut self, line: &str) {
        for target in [Target::Stdout, Target::Stderr] {
            if self.shares_terminal(target) {
                self.interrupt_all(target);
            }
        }
        let out = &mut self.out[Target::Stderr as usize];
        if !std::mem::replace(&mut self.at_start[Target::Stderr as usize], true) {
            out.push(b'\n');
        }
        out.extend_from_slice(line.as_bytes());
        if !line.ends_with('\n') {
            out.push(b'\n');
        }
    }

    /// When to call [`Self::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let timeouts = self.tracts.values().filter_map(|tract| match tract {
            Tract::Safe(safe) => safe.lines.poll_timeout(),
            Tract::Raw { .. } => None,
        });
        timeouts.min().map(Instant::from_std)
    }

    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let due = self.tracts.iter().filter_map(|(source, tract)| match tract {
            Tract::Safe(safe) if safe.lines.poll_timeout().is_some_and(|at| at <= now.into_std()) => {
                Some(source.clone())
            }
            Tract::Safe(_) | Tract::Raw { .. } => None,
        });
        let due = due.collect::<Vec<_>>();
        for source in due {
            self.interrupt_others(&source);
            let at = self.target(&source) as usize;
            if let Some(Tract::Safe(safe)) = self.tracts.get_mut(&source) {
                safe.lines.handle_timeout(now.into_std(), &mut self.out[at]);
            }
        }
    }

    /// Ends every stream: what is held is shown.
    pub(super) fn finish(&mut self) {
        let now = Instant::now();
        for (source, mut tract) in std::mem::take(&mut self.tracts) {
            let at = self.target(&source) as usize;
            tract.finish(now, &mut self.out[at]);
        }
    }

    /// What is to be written to a descriptor now.
    pub(super) fn take(&mut self, target: Target) -> Bytes {
        std::mem::take(&mut self.out[target as usize]).into()
    }

    fn target(&self, source: &Source) -> Target {
        source.target(self.joined)
    }

    /// Whether what is written to `target` appears among the lines of standard error.
    fn shares_terminal(&self, target: Target) -> bool {
        target == Target::Stderr || self.modes[0] != Render::Raw && self.modes[1] != Render::Raw
    }

    /// Somebody is about to write: half-shown lines of all others on the same terminal are left in order.
    fn interrupt_others(&mut self, writer: &Source) {
        let target = self.target(writer);
        let both = self.modes[0] != Render::Raw && self.modes[1] != Render::Raw;
        for (source, tract) in self.tracts.iter_mut().filter(|(source, _)| *source != writer) {
            let other = source.target(self.joined);
            if both || other == target {
                tract.interrupt(&mut self.out[other as usize]);
            }
        }
    }

    fn interrupt_all(&mut self, target: Target) {
        for (source, tract) in &mut self.tracts {
            let other = source.target(self.joined);
            if other == target {
                tract.interrupt(&mut self.out[other as usize]);
            }
        }
    }
}

impl Source {
    /// Where it is written to.
    fn target(&self, joined: bool) -> Target {
        match self {
            Self::Build(_, target) if !joined => *target,
            Self::Build(..) | Self::Launcher => Target::Stderr,
        }
    }
}

impl From<Stream> for Target {
    /// Events are no output; what is said of them is said on standard error.
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Stdout => Self::Stdout,
            Stream::Stderr | Stream::Event => Self::Stderr,
        }
    }
}

impl Tract {
    fn new(mode: Render, color: bool, prefix: Vec<u8>) -> Self {
        match mode {
            Render::Raw => Self::Raw { prefix, held: Vec::new(), within_line: false },
            Render::Safe(style) => Self::Safe(Box::new(Safe {
                sanitizer: Sanitizer::new(color),
                lines: LinePrinter::new(style, prefix),
                clean: Vec::new(),
            })),
        }
    }

    fn push(&mut self, block: &[u8], now: Instant, out: &mut Vec<u8>) {
        match self {
            Self::Raw { prefix, .. } if prefix.is_empty() => out.extend_from_slice(block),
            Self::Raw { prefix, held, within_line } => {
                for line in block.split_inclusive(|&byte| byte == b'\n') {
                    let is_whole = line.ends_with(b"\n");
                    if !is_whole && held.len() + line.len() <= LONGEST_HELD {
                        held.extend_from_slice(line);
                        continue;
                    }
                    if !*within_line {
                        out.extend_from_slice(prefix);
                    }
                    out.append(held);
                    out.extend_from_slice(line);
                    *within_line = !is_whole;
                }
            }
            Self::Safe(safe) => safe.push(block, now, out),
        }
    }

    /// Somebody else writes next.
    fn interrupt(&mut self, out: &mut Vec<u8>) {
        match self {
            // A line too long to be kept whole; one step alone is passed on byte for byte.
            Self::Raw { prefix, within_line, .. } if !prefix.is_empty() && *within_line => {
                out.push(b'\n');
                *within_line = false;
            }
            Self::Raw { .. } => {}
            Self::Safe(safe) => safe.lines.interrupt(out),
        }
    }

    fn finish(&mut self, now: Instant, out: &mut Vec<u8>) {
        match self {
            Self::Raw { prefix, held, within_line } if !held.is_empty() => {
                if !std::mem::take(within_line) {
                    out.extend_from_slice(prefix);
                }
                out.append(held);
                out.push(b'\n');
            }
            Self::Raw { .. } => self.interrupt(out),
            Self::Safe(safe) => safe.finish(now, out),
        }
    }
}

impl Safe {
    fn push(&mut self, block: &[u8], now: Instant, out: &mut Vec<u8>) {
        self.clean.clear();
        self.sanitizer.push(block, &mut self.clean);
        self.lines.push(&self.clean, now.into_std(), out);
    }

    fn finish(&mut self, now: Instant, out: &mut Vec<u8>) {
        self.clean.clear();
        self.sanitizer.finish(&mut self.clean);
        self.lines.push(&self.clean, now.into_std(), out);
        self.lines.finish(out);
    }
}

fn prefix(source: &Source, prefixes: bool) -> Vec<u8> {
    match source {
        Source::Build(step, _) if prefixes => format!("[{step}] ").into_bytes(),
        Source::Build(..) | Source::Launcher => Vec::new(),
    }
}

/// Whether two descriptors are of the same file, pipe or terminal.
fn is_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let place = |stream| fstat(stream).map(|stat| (stat.st_dev, stat.st_ino));
    matches!((place(a), place(b)), (Ok(a), Ok(b)) if a == b)
}

fn mode(choice: RenderChoice, stream: BorrowedFd<'_>) -> Render {
    match choice {
        RenderChoice::Raw => Render::Raw,
        RenderChoice::Safe | RenderChoice::Auto { .. } if isatty(stream) => Render::Safe(Style::Terminal),
        RenderChoice::Safe => Render::Safe(Style::Sideband),
        RenderChoice::Auto { under_git } if under_git && is_pipe(stream) => Render::Safe(Style::Sideband),
        RenderChoice::Auto { .. } => Render::Raw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_is_byte_for_byte_and_own_lines_start_on_a_line_of_their_own() {
        let mut screen = Screen::new([Render::Raw; 2], true, false);
        let now = Instant::now();
        screen.show(build(Target::Stdout), b"a\0\x1b[2Jb", now);
        screen.show(build(Target::Stderr), b"partial", now);
        screen.own_line("phonehome: hello");
        screen.finish();
        assert_eq!(screen.take(Target::Stdout), &b"a\0\x1b[2Jb"[..]);
        assert_eq!(screen.take(Target::Stderr), &b"partial\nphonehome: hello\n"[..]);
    }

    #[test]
    fn several_steps_carry_their_names_and_never_share_a_line() {
        let mut screen = Screen::new([Render::Raw; 2], true, true);
        let now = Instant::now();
        screen.show(step("one", Target::Stdout), b"a\nb", now);
        screen.show(step("two", Target::Stdout), b"c\n", now);
        screen.show(step("one", Target::Stdout), b"d\n", now);
        screen.show(step("two", Target::Stdout), b"no end", now);
        screen.finish();
        assert_eq!(screen.take(Target::Stdout), &b"[one] a\n[two] c\n[one] bd\n[two] no end\n"[..]);
    }

    #[test]
    fn the_safe_form_keeps_two_streams_apart_on_one_terminal() {
        let mut screen = Screen::new([Render::Safe(Style::Terminal); 2], true, false);
        let now = Instant::now();
        screen.show(build(Target::Stdout), b"out", now);
        screen.show(build(Target::Stderr), b"err\x1b[2J\n", now);
        screen.finish();
        assert_eq!(screen.take(Target::Stderr), &b"err\n"[..]);
        assert_eq!(screen.take(Target::Stdout), &b"out\n"[..]);
    }

    #[test]
    fn what_shares_a_pipe_keeps_its_order() {
        let mut screen = Screen { joined: true, ..Screen::new([Render::Raw; 2], true, false) };
        let now = Instant::now();
        screen.show(build(Target::Stdout), b"out\n", now);
        screen.show(build(Target::Stderr), b"err\n", now);
        screen.show(build(Target::Stdout), b"partial", now);
        screen.own_line("phonehome: hello");
        assert_eq!(screen.take(Target::Stdout), &b""[..]);
        assert_eq!(screen.take(Target::Stderr), &b"out\nerr\npartial\nphonehome: hello\n"[..]);
    }

    fn build(target: Target) -> Source {
        Source::Build(StepName::default(), target)
    }

    fn step(name: &str, target: Target) -> Source {
        Source::Build(name.parse().unwrap(), target)
    }
}
