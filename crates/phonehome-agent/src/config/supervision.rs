//! How the command is run, ended and stayed with.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{ValueEnum, builder::BoolishValueParser};
use phonehome_proto::signal;
use rustix::fs::{Gid, Uid};
use tracing::warn;

use super::{
    ConfigError,
    args::{Unfit, duration, parsed},
};

/// Options about the command's processes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Supervision")]
pub struct SupervisionArgs {
    /// Run the command on a terminal: programs show colour and progress. There is one stream then, stdout
    #[arg(long, env = "PHONEHOME_PTY", value_parser = BoolishValueParser::new())]
    pub pty: bool,

    /// Size of that terminal; by default that of the agent's own terminal, else 80x24
    #[arg(long, env = "PHONEHOME_PTY_SIZE", value_name = "COLUMNSxROWS", value_parser = window)]
    pub pty_size: Option<Window>,

    /// Between TERM and KILL for the command's process group
    #[arg(long, env = "PHONEHOME_GRACE_PERIOD", value_name = "TIME", default_value = GRACE_PERIOD, value_parser = duration)]
    pub grace_period: Duration,

    /// What to do about processes that outlive the command
    #[arg(long, env = "PHONEHOME_LEFTOVERS", value_name = "POLICY", value_enum, default_value_t)]
    pub leftovers: Leftovers,

    /// Pass another signal on than the one that came; 0 passes nothing on. Numbers or names: 15:3,HUP:QUIT
    #[arg(long, env = "PHONEHOME_REWRITE_SIGNAL", value_name = "FROM:TO", value_delimiter = ',', value_parser = rewrite)]
    pub rewrite_signal: Vec<(u8, u8)>,

    /// Signal that the agent gets when its own parent dies
    #[arg(long, env = "PHONEHOME_PARENT_DEATH_SIGNAL", value_name = "SIGNAL", value_parser = signal_number)]
    pub parent_death_signal: Option<u8>,

    /// Run the command as this user. The group is the user's in /etc/passwd, else the number of the user
    #[arg(long, env = "PHONEHOME_USER", value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<User>,

    /// The command and its descendants can gain no privileges, by set-user-ID programs say
    #[arg(long, env = "PHONEHOME_NO_NEW_PRIVILEGES", value_parser = BoolishValueParser::new())]
    pub no_new_privileges: bool,

    /// Stay this much longer after the end, so that a person can look inside; TERM ends it
    #[arg(long, env = "PHONEHOME_HOLD", value_name = "TIME", default_value = HOLD, value_parser = duration)]
    pub hold: Duration,

    /// The same after a failure only; the longer of the two counts
    #[arg(long, env = "PHONEHOME_HOLD_ON_FAILURE", value_name = "TIME", default_value = HOLD, value_parser = duration)]
    pub hold_on_failure: Duration,

    /// The pod's termination grace: after TERM everything is done within this time. A number is seconds, as in a manifest
    #[arg(long, env = "PHONEHOME_TERMINATION_GRACE", value_name = "TIME", value_parser = seconds_or_duration)]
    pub termination_grace: Option<Duration>,

    /// File that gets a short reason when the command fails, if it exists
    #[arg(long, env = "PHONEHOME_TERMINATION_LOG", value_name = "PATH", default_value = TERMINATION_LOG)]
    pub termination_log: PathBuf,
}

/// What they are when nothing is given.
impl Default for SupervisionArgs {
    fn default() -> Self {
        Self {
            pty: false,
            pty_size: None,
            grace_period: parsed(GRACE_PERIOD, duration),
            leftovers: Leftovers::default(),
            rewrite_signal: Vec::new(),
            parent_death_signal: None,
            user: None,
            no_new_privileges: false,
            hold: parsed(HOLD, duration),
            hold_on_failure: parsed(HOLD, duration),
            termination_grace: None,
            termination_log: TERMINATION_LOG.into(),
        }
    }
}

// What these options are when they are not given.
const GRACE_PERIOD: &str = "30s";
const HOLD: &str = "0s";
const TERMINATION_LOG: &str = "/dev/termination-log";

/// What becomes of processes that outlive the command.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Leftovers {
    /// The log ends when they have ended.
    Wait,
    /// They get 5 s to end by themselves if they hold the output open, then TERM, and KILL after the grace period.
    #[default]
    Terminate,
    /// Nothing is done to them; output that they hold open is read for 5 s more.
    Leave,
}

impl Leftovers {
    /// As it is typed.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Wait => "wait",
            Self::Terminate => "terminate",
            Self::Leave => "leave",
        }
    }
}

/// Columns and rows of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

impl Default for Window {
    fn default() -> Self {
        Self { columns: 80, rows: 24 }
    }
}

fn window(text: &str) -> Result<Window, Unfit> {
    let sides = text.split_once('x').and_then(|(columns, rows)| Some((columns.parse().ok()?, rows.parse().ok()?)));
    match sides {
        Some((columns @ 1.., rows @ 1..)) => Ok(Window { columns, rows }),
        Some(_) | None => Err(Unfit("not COLUMNSxROWS, such as 120x40")),
    }
}

/// Whom the command runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id, where it was given.
    pub gid: Option<u32>,
}

impl User {
    /// The group that was given, else the user's in the user database, else the one of the same number.
    #[must_use]
    pub fn group(&self, passwd: &Path) -> u32 {
        let listed = || primary_group(&std::fs::read_to_string(passwd).ok()?, self.uid);
        self.gid.or_else(listed).unwrap_or(self.uid)
    }

    /// Both ids, for the owner of a file.
    pub(crate) fn owner(&self, group: u32) -> (Uid, Gid) {
        (Uid::from_raw(self.uid), Gid::from_raw(group))
    }
}

/// Lines are `name:password:UID:GID:comment:directory:shell` (passwd(5)).
fn primary_group(passwd: &str, uid: u32) -> Option<u32> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let is_user = fields.next()?.parse() == Ok(uid);
        fields.next()?.parse().ok().filter(|_| is_user)
    })
}

fn user(text: &str) -> Result<User, Unfit> {
    let (uid, gid) = text.split_once(':').map_or((text, None), |(uid, gid)| (uid, Some(gid)));
    // -1 means "no change" to setuid(2), it is nobody's number.
    let id = |text: &str| text.parse().ok().filter(|id: &u32| *id != u32::MAX);
    let bad = Unfit("not UID or UID:GID, two numbers such as 1000:1000");
    let uid = id(uid).ok_or(bad)?;
    Ok(User { uid, gid: gid.map(|gid| id(gid).ok_or(bad)).transpose()? })
}

/// KILL and STOP cannot be caught, CHLD is the agent's own (signal(7)).
const NEVER_CAUGHT: [u8; 3] = [9, 17, 19];

fn rewrite(text: &str) -> Result<(u8, u8), Unfit> {
    let bad = Unfit("not FROM:TO, two signals by name or number, such as TERM:QUIT or 15:3");
    let (from, to) = text.split_once(':').ok_or(bad)?;
    if signal::parse(from).is_some_and(|from| NEVER_CAUGHT.contains(&from)) {
        return Err(Unfit("about KILL, STOP or CHLD, which are never passed on"));
    }
    let to = if to == "0" { 0 } else { signal::parse(to).ok_or(bad)? };
    Ok((signal::parse(from).ok_or(bad)?, to))
}

fn signal_number(text: &str) -> Result<u8, Unfit> {
    signal::parse(text).ok_or(Unfit("not the name or number of a signal, such as TERM or 15"))
}

fn seconds_or_duration(text: &str) -> Result<Duration, Unfit> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { duration(&format!("{text}s")) } else { duration(text) }
}

/// How the command is run and ended, checked.
#[derive(Debug, Clone)]
pub struct Supervision {
    /// The terminal to run it on, if any. Without a size it gets that of the agent's own.
    pub pty: Option<Option<Window>>,
    /// Between TERM and KILL.
    pub grace: Duration,
    /// What becomes of processes that outlive it.
    pub leftovers: Leftovers,
    /// Which signal is passed on for another.
    pub rewrites: Rewrites,
    /// The signal this process gets when its parent dies.
    pub parent_death_signal: Option<u8>,
    /// Whom it runs as.
    pub user: Option<User>,
    /// Whether it can gain no privileges.
    pub no_new_privileges: bool,
    /// How long to stay after the end, if it succeeded, if it failed.
    pub hold: [Duration; 2],
    /// The pod's termination grace, if told.
    pub termination_grace: Option<Duration>,
    /// Where a short reason goes.
    pub termination_log: PathBuf,
}

impl Supervision {
    pub(super) fn try_from_args(args: &SupervisionArgs, merge: bool) -> Result<Self, ConfigError> {
        if args.pty_size.is_some() && !args.pty {
            return Err(ConfigError::SizeWithoutTerminal);
        }
        if merge && args.pty {
            warn!("--merge changes nothing with --pty: a terminal is one stream");
        }
        Ok(Self {
            pty: args.pty.then_some(args.pty_size),
            grace: args.grace_period,
            leftovers: args.leftovers,
            rewrites: Rewrites(args.rewrite_signal.clone()),
            parent_death_signal: args.parent_death_signal,
            user: args.user,
            no_new_privileges: args.no_new_privileges,
            hold: [args.hold, args.hold.max(args.hold_on_failure)],
            termination_grace: args.termination_grace,
            termination_log: args.termination_log.clone(),
        })
    }

    /// Grace period and stay after a TERM at which the pod has this long to live: with both as configured when they
    /// fit, otherwise the stay gets up to a third of the time and the command the rest.
    #[must_use]
    pub fn fit(&self, linger: Duration) -> Notice {
        let Some(total) = self.termination_grace else { return Notice { grace: self.grace, total: None } };
        let total = total.saturating_sub(SAFETY);
        let reserve = linger.min(total / 3);
        Notice { grace: self.grace.min(total - reserve), total: Some(total) }
    }

    /// Says what will not be as configured when the pod is told to end.
    pub(super) fn check(&self, linger: Duration) {
        let Some(total) = self.termination_grace else { return };
        let [_, hold] = self.hold;
        let wanted = self.grace.saturating_add(linger).saturating_add(SAFETY);
        if wanted > total {
            let fitted = self.fit(linger);
            warn!(
                "--grace-period and --linger need {} s, the pod's termination grace is {} s: after TERM the command is \
                 killed after {} s and its log has the rest of the time",
                wanted.as_secs_f64(),
                total.as_secs_f64(),
                fitted.grace.as_secs_f64()
            );
        }
        if linger.saturating_add(hold) > total {
            warn!(
                "--linger and --hold stay for up to {} s, longer than the pod's termination grace of {} s: TERM ends \
                 them early",
                linger.saturating_add(hold).as_secs_f64(),
                total.as_secs_f64()
            );
        }
    }
}

/// What remains of a pod's termination grace as a reserve: the exit itself, and a clock that started before TERM came.
const SAFETY: Duration = Duration::from_secs(1);

/// How much time there is once the agent was told to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notice {
    /// Until the command is killed.
    pub grace: Duration,
    /// Until the agent is gone, if that is limited.
    pub total: Option<Duration>,
}

/// Which signal is passed on for another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rewrites(pub Vec<(u8, u8)>);

impl Rewrites {
    /// The signal to pass on for `signal`, if any. The last one of several for the same signal counts.
    #[must_use]
    pub fn apply(&self, signal: u8) -> Option<u8> {
        let rewritten = self.0.iter().rev().find(|(from, _)| *from == signal);
        rewritten.map_or(Some(signal), |(_, to)| Some(*to).filter(|to| *to != 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_rewritten_by_name_or_number() {
        let rewrites =
            Rewrites(vec![rewrite("15:3").unwrap(), rewrite("HUP:SIGTERM").unwrap(), rewrite("2:0").unwrap()]);
        assert_eq!([15, 1, 2, 10].map(|signal| rewrites.apply(signal)), [Some(3), Some(15), None, Some(10)]);
        assert_eq!(Rewrites(vec![(1, 2), (1, 3)]).apply(1), Some(3));
        for wrong in ["15", "15:", ":3", "0:3", "TERM:QUITE", "15:3:4", "65:1", "9:3", "CHLD:3"] {
            assert!(rewrite(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn users_are_numbers() {
        assert_eq!(user("7"), Ok(User { uid: 7, gid: None }));
        assert_eq!(user("7:8"), Ok(User { uid: 7, gid: Some(8) }));
        for wrong in ["", "nobody", "7:", "-1", "4294967295", "7:8:9"] {
            assert!(user(wrong).is_err(), "{wrong}");
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nbuild:x:7:70::/:\n";
        assert_eq!([primary_group(passwd, 7), primary_group(passwd, 8)], [Some(70), None]);
    }

    #[test]
    fn windows_have_two_sides() {
        assert_eq!(window("120x40"), Ok(Window { columns: 120, rows: 40 }));
        for wrong in ["120", "x", "0x1", "1x0", "70000x1", "1x1x1"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_termination_grace_may_be_a_plain_number_of_seconds() {
        assert_eq!(seconds_or_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(seconds_or_duration("2m"), Ok(Duration::from_secs(120)));
        assert!(seconds_or_duration("soon").is_err());
    }

    #[test]
    fn what_follows_a_term_fits_into_the_pods_grace() {
        let seconds = Duration::from_secs;
        let fit = |grace, linger, total: Option<u64>| {
            let mut supervision = supervision();
            (supervision.grace, supervision.termination_grace) = (seconds(grace), total.map(seconds));
            supervision.fit(seconds(linger))
        };
        assert_eq!(fit(30, 30, None), Notice { grace: seconds(30), total: None });
        assert_eq!(fit(10, 5, Some(30)), Notice { grace: seconds(10), total: Some(seconds(29)) });
        assert_eq!(fit(30, 30, Some(31)), Notice { grace: seconds(20), total: Some(seconds(30)) });
        assert_eq!(fit(30, 30, Some(0)), Notice { grace: seconds(0), total: Some(seconds(0)) });
    }

    fn supervision() -> Supervision {
        Supervision::try_from_args(&SupervisionArgs::default(), false).unwrap()
    }
}
