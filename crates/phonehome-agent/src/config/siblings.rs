//! What the agent is told about the other containers of its pod.

use std::{ffi::OsStr, fmt, path::PathBuf, str::FromStr, time::Duration};

use clap::Args;
pub use phonehome_proto::id::StepName as SiblingName;
use phonehome_proto::{id::NameError, signal};

use super::{
    ConfigError, User,
    args::{Limit, Unfit, limit, parsed},
};
pub use crate::{
    probe::{Probe, ProbeError, ReadyWhen, output::Pattern},
    siblings::expected::{ExpectedExits, ExpectedExitsError},
};

/// Options about siblings, as typed.
#[derive(Debug, Args)]
pub struct SiblingsArgs {
    /// Name of this container in the graveyard. With one, its birth and death are told there, in the form of kubexit
    #[arg(long, env = "PHONEHOME_NAME", value_name = "NAME", help_heading = "Siblings")]
    pub name: Option<SiblingName>,

    /// Directory that the containers of the pod share [default: /graveyard]
    #[arg(long, env = "PHONEHOME_GRAVEYARD", value_name = "PATH", help_heading = "Siblings")]
    pub graveyard: Option<PathBuf>,

    /// Marks what is carved there: tombstones with another mark are ignored. The pod's uid, say, in a directory that
    /// outlives the pod
    #[arg(long, env = "PHONEHOME_GENERATION", value_name = "TEXT", help_heading = "Siblings")]
    pub generation: Option<String>,

    /// End the command when one of these has died; do not start it when one is dead already
    #[arg(
        long,
        env = "PHONEHOME_DEATH_DEPS",
        value_name = "NAME,...",
        value_parser = list::<SiblingName>(','),
        help_heading = "Siblings"
    )]
    pub death_deps: Vec<List<SiblingName>>,

    /// Signal that ends it then; KILL follows after the grace period [default: TERM]
    #[arg(long, env = "PHONEHOME_DEATH_SIGNAL", value_name = "SIGNAL", value_parser = death_signal, help_heading = "Siblings")]
    pub death_signal: Option<u8>,

    /// Ends that count as success then: exit codes, ranges of them, signals, or any: 0-3,143,SIGINT. A crash never does
    #[arg(long, env = "PHONEHOME_EXPECTED_EXIT", value_name = "CODE,...", help_heading = "Siblings")]
    pub expected_exit: Option<ExpectedExits>,

    /// Start the command only when all of these have been born, or, as NAME:ready, are ready
    #[arg(
        long,
        env = "PHONEHOME_BIRTH_DEPS",
        value_name = "NAME[:ready],...",
        value_parser = list::<BirthDep>(','),
        help_heading = "Siblings"
    )]
    pub birth_deps: Vec<List<BirthDep>>,

    /// Start the command only when this probe passes, for what has no agent: tcp:PORT, tcp:HOST:PORT, http://HOST:PORT/PATH,
    /// unix:PATH, file:PATH (exists), content:PATH (is not empty) or exec:COMMAND. Can be given several times; in the
    /// variable each stands on a line of its own
    #[arg(long, env = "PHONEHOME_WAIT_FOR", value_name = "NAME=PROBE", value_parser = list::<WaitFor>('\n'), help_heading = "Siblings")]
    pub wait_for: Vec<List<WaitFor>>,

    /// How long to wait for all of them; off for no limit
    #[arg(long, env = "PHONEHOME_BIRTH_TIMEOUT", value_name = "TIME", default_value = BIRTH_TIMEOUT, value_parser = limit, help_heading = "Siblings")]
    pub birth_timeout: Limit,

    /// Tell siblings that the command is ready when this passes: a probe as for --wait-for, output:REGEX (a line of its
    /// output matches) or notify (it says so itself, on NOTIFY_SOCKET)
    #[arg(long, env = "PHONEHOME_READY_WHEN", value_name = "PROBE", help_heading = "Siblings")]
    pub ready_when: Option<ReadyWhen>,
}

/// What they are when nothing is given.
impl Default for SiblingsArgs {
    fn default() -> Self {
        Self {
            name: None,
            graveyard: None,
            generation: None,
            death_deps: Vec::new(),
            death_signal: None,
            expected_exit: None,
            birth_deps: Vec::new(),
            wait_for: Vec::new(),
            birth_timeout: parsed(BIRTH_TIMEOUT, limit),
            ready_when: None,
        }
    }
}

/// What this option is when it is not given.
const BIRTH_TIMEOUT: &str = "30s";

/// The variables of kubexit that are understood, each after the one whose place it takes when that one is not set.
const ALIASES: [(&str, &str); 6] = [
    ("PHONEHOME_NAME", "KUBEXIT_NAME"),
    ("PHONEHOME_GRAVEYARD", "KUBEXIT_GRAVEYARD"),
    ("PHONEHOME_DEATH_DEPS", "KUBEXIT_DEATH_DEPS"),
    ("PHONEHOME_BIRTH_DEPS", "KUBEXIT_BIRTH_DEPS"),
    ("PHONEHOME_BIRTH_TIMEOUT", "KUBEXIT_BIRTH_TIMEOUT"),
    ("PHONEHOME_GRACE_PERIOD", "KUBEXIT_GRACE_PERIOD"),
];

/// The variable of kubexit that takes the place of one of ours.
pub(super) fn alias(variable: &OsStr) -> Option<&'static str> {
    ALIASES.iter().find(|(ours, _)| variable == *ours).map(|(_, alias)| *alias)
}

/// What the agent does about its siblings; by default nothing.
#[derive(Debug, Clone)]
pub struct SiblingsConfig {
    /// Under which this container's tombstone is carved; `None` carves none.
    pub name: Option<SiblingName>,
    /// Where tombstones are.
    pub graveyard: PathBuf,
    /// Which of them count: those of another generation do not.
    pub generation: Option<String>,
    /// Whose death ends the command.
    pub death_deps: Vec<SiblingName>,
    /// The signal that ends it then.
    pub death_signal: u8,
    /// How it may end then.
    pub expected_exits: ExpectedExits,
    /// Whose birth it waits for.
    pub birth_deps: Vec<BirthDep>,
    /// What else it waits for.
    pub wait_for: Vec<WaitFor>,
    /// How long it waits; `None` for no limit.
    pub birth_timeout: Option<Duration>,
    /// What shows that it is ready.
    pub ready_when: Option<ReadyWhen>,
    /// Whom probes that are commands run as, where not as the agent: as the command.
    pub probe_user: Option<User>,
}

/// What ends a command in an orderly way (signal(7)).
const SIGTERM: u8 = 15;

/// Where kubexit has it.
const GRAVEYARD: &str = "/graveyard";

impl SiblingsConfig {
    /// Whether there is something to do that waits for a disk or a look-up: tombstones and probes.
    pub(crate) fn needs_a_worker(&self) -> bool {
        let has_tombstones = self.name.is_some() || !self.death_deps.is_empty() || !self.birth_deps.is_empty();
        has_tombstones || !self.wait_for.is_empty() || self.ready_when.is_some()
    }

    pub(super) fn try_from_args(args: &SiblingsArgs) -> Result<Self, ConfigError> {
        let config = Self::unchecked(args);
        match config.own_dependency() {
            Some((option, name)) => Err(ConfigError::OwnDependency { option, name }),
            None => Ok(config),
        }
    }

    /// What is known of them whatever else is wrong: enough to tell them of it.
    #[must_use]
    pub fn unchecked(args: &SiblingsArgs) -> Self {
        Self {
            name: args.name.clone(),
            graveyard: args.graveyard.clone().unwrap_or_else(|| GRAVEYARD.into()),
            generation: args.generation.clone(),
            death_deps: List::joined(&args.death_deps),
            death_signal: args.death_signal.unwrap_or(SIGTERM),
            expected_exits: args.expected_exit.clone().unwrap_or_default(),
            birth_deps: List::joined(&args.birth_deps),
            wait_for: List::joined(&args.wait_for),
            birth_timeout: args.birth_timeout.0,
            ready_when: args.ready_when.clone(),
            probe_user: None,
        }
    }

    /// Its last death would be taken for that of somebody else.
    fn own_dependency(&self) -> Option<(&'static str, SiblingName)> {
        let births = self.birth_deps.iter().map(|dep| ("--birth-deps", &dep.name));
        let mut deps = births.chain(self.death_deps.iter().map(|name| ("--death-deps", name)));
        let (option, name) = deps.find(|(_, name)| Some(*name) == self.name.as_ref())?;
        Some((option, name.clone()))
    }
}

/// Several values of one option. Blank ones are none: manifests leave ends of lines behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List<T>(Vec<T>);

impl<T: Clone> List<T> {
    /// All of an option that was given several times.
    fn joined(lists: &[Self]) -> Vec<T> {
        lists.iter().flat_map(|list| list.0.iter().cloned()).collect()
    }
}

fn list<T: FromStr<Err: fmt::Display>>(delimiter: char) -> impl Fn(&str) -> Result<List<T>, String> + Clone {
    move |text| {
        let items = text.split(delimiter).map(str::trim).filter(|item| !item.is_empty());
        items.map(|item| item.parse().map_err(|error: T::Err| error.to_string())).collect::<Result<_, _>>().map(List)
    }
}

/// Somebody who has to be there before the command is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BirthDep {
    /// Who.
    pub name: SiblingName,
    /// How far it has to be.
    pub stage: Stage,
}

/// How far a life has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The command has been started.
    Born,
    /// Its readiness probe has passed.
    Ready,
}

impl FromStr for BirthDep {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let (name, stage) = match text.strip_suffix(":ready") {
            Some(name) => (name, Stage::Ready),
            None => (text, Stage::Born),
        };
        Ok(Self { name: name.parse()?, stage })
    }
}

impl fmt::Display for BirthDep {
    /// What has to happen: `db to be born`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stage = match self.stage {
            Stage::Born => "born",
            Stage::Ready => "ready",
        };
        write!(f, "{} to be {stage}", self.name)
    }
}

/// Something without an agent that has to be there before the command is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitFor {
    /// What it is called.
    pub name: SiblingName,
    /// How to know.
    pub probe: Probe,
}

/// Why a text does not say what to wait for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaitForError {
    /// What stands before the `=`.
    #[error(transparent)]
    BadName(#[from] NameError),
    /// What stands after it.
    #[error(transparent)]
    BadProbe(#[from] ProbeError),
    /// There is no `=`.
    #[error("it needs the form NAME=PROBE, such as db=tcp:5432")]
    NoName,
}

impl FromStr for WaitFor {
    type Err = WaitForError;

    fn from_str(text: &str) -> Result<Self, WaitForError> {
        let (name, probe) = text.split_once('=').ok_or(WaitForError::NoName)?;
        Ok(Self { name: name.parse()?, probe: probe.parse()? })
    }
}

fn death_signal(text: &str) -> Result<u8, Unfit> {
    signal::parse(text).ok_or(Unfit("not the name or number of a signal, such as TERM or 15"))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::config::{
        Args as AllArgs, Config, ProxySettings,
        given::{Source, source},
    };

    #[test]
    fn without_options_there_is_nothing_to_do() {
        let config = parse(&[]).unwrap();
        assert_eq!((config.name, config.ready_when.is_none()), (None, true));
        assert!(config.death_deps.is_empty() && config.birth_deps.is_empty() && config.wait_for.is_empty());
        assert_eq!(config.expected_exits, ExpectedExits::default());
        assert_eq!(config.death_signal, SIGTERM);
        assert_eq!((config.graveyard, config.birth_timeout), ("/graveyard".into(), Some(Duration::from_secs(30))));
    }

    #[test]
    fn every_option_arrives() {
        let config = parse(&[
            "--name=web",
            "--graveyard=/g",
            "--generation=7",
            "--death-deps=main, other,\n",
            "--death-signal=int",
            "--expected-exit=0-3,SIGINT",
            "--birth-deps=db:ready,cache",
            "--wait-for=a=tcp:1\n\nb=exec:sh -c 'x=1, y'\n",
            "--wait-for=c=http://h/",
            "--birth-timeout=off",
            "--ready-when=output:^a,b\\.$",
        ])
        .unwrap();
        assert_eq!(config.name.unwrap().as_str(), "web");
        assert_eq!(config.death_deps.iter().map(SiblingName::as_str).collect::<Vec<_>>(), ["main", "other"]);
        assert_eq!((config.death_signal, config.birth_timeout), (2, None));
        assert_eq!((config.graveyard, config.generation), ("/g".into(), Some("7".to_owned())));
        let births: Vec<_> = config.birth_deps.iter().map(ToString::to_string).collect();
        assert_eq!(births, ["db to be ready", "cache to be born"]);
        let waits: Vec<_> = config.wait_for.iter().map(|wait| format!("{}={}", wait.name, wait.probe)).collect();
        assert_eq!(waits, ["a=tcp:1", "b=exec:sh -c 'x=1, y'", "c=http://h/"]);
        assert_eq!(config.ready_when.unwrap().to_string(), "output:^a,b\\.$");
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (option, expected) in [
            ("--name=a/b", "may not stand in a name"),
            ("--name=..", "may not start with"),
            ("--birth-deps=:ready", "may not be empty"),
            ("--birth-deps=a:born", "may not stand in a name"),
            ("--death-signal=SIGNOPE", "such as TERM or 15"),
            ("--expected-exit=SEGV", "SIGSEGV is a crash"),
            ("--wait-for=tcp:80", "NAME=PROBE"),
            ("--wait-for=db=output:x", "--ready-when"),
            ("--ready-when=output:(", "pattern of output:"),
        ] {
            let failure = parse(&[option]).unwrap_err();
            assert!(failure.contains(expected), "{option}: {failure}");
        }
        let own = parse(&["--name=web", "--death-deps=main,web"]).unwrap_err();
        assert_eq!(own, "--death-deps names web, which is this container itself (--name)");
    }

    #[test]
    fn a_variable_of_kubexit_counts_when_ours_does_not() {
        let check = |set: &[(&str, &str)], expected| {
            let value_of = |name: &OsStr| set.iter().find(|(set, _)| name == *set).map(|(_, value)| value.into());
            assert_eq!(source("PHONEHOME_NAME".as_ref(), value_of), expected, "{set:?}");
        };
        check(&[("PHONEHOME_NAME", "a"), ("KUBEXIT_NAME", "b")], Source::Own);
        check(&[("PHONEHOME_NAME", "a")], Source::Own);
        check(&[("KUBEXIT_NAME", "b")], Source::Alias("KUBEXIT_NAME"));
        check(&[("PHONEHOME_NAME", ""), ("KUBEXIT_NAME", "b")], Source::Alias("KUBEXIT_NAME"));
        check(&[("PHONEHOME_NAME", ""), ("KUBEXIT_NAME", "")], Source::Nothing);
        check(&[("KUBEXIT_NAME", "")], Source::Own);
        check(&[], Source::Own);
        let command = AllArgs::command();
        let known: Vec<_> = command.get_arguments().filter_map(clap::Arg::get_env).collect();
        for (ours, alias) in ALIASES {
            assert!(known.contains(&OsStr::new(ours)) || ours == "PHONEHOME_GRACE_PERIOD", "{alias}");
        }
    }

    #[test]
    fn times_as_kubexit_takes_them_are_taken() {
        for (text, millis) in
            [("30s", 30_000), ("1m30s", 90_000), ("1h0m0s", 3_600_000), ("1.5s", 1_500), ("300ms", 300)]
        {
            let timeout = parse(&[&format!("--birth-timeout={text}")]).unwrap().birth_timeout;
            assert_eq!(timeout, Some(Duration::from_millis(millis)), "{text}");
        }
    }

    fn parse(options: &[&str]) -> Result<SiblingsConfig, String> {
        let line = ["agent"].iter().chain(options).chain(&["--", "x"]);
        let args = AllArgs::try_parse_from(line).map_err(|usage| usage.to_string())?;
        let config =
            Config::try_from_args(args, &ProxySettings::default(), |_| None).map_err(|error| error.to_string())?;
        Ok(config.siblings)
    }
}
