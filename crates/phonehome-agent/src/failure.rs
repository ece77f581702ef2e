//! The agent's own errors, and what each of them makes it exit with.

use std::{error::Error, io, iter::successors};

use crate::{config::ConfigError, install::InstallError};

/// Why the agent could not do its work. What the command does is never one of these.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// An option is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The agent is not where it was to be installed.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// Nobody took what was to be printed.
    #[error("cannot print")]
    Print(#[source] io::Error),
    /// `--start connected`, and the server does not want this build.
    #[error("the command was not started: {0}")]
    Refused(String),
    /// `--pty`, and the system has no terminal to give.
    #[error("--pty: cannot make a terminal, which needs /dev/ptmx")]
    Terminal(#[source] io::Error),
    /// `--require-delivery`, and the server does not have the complete log.
    #[error("the command ended with exit code {code}, but its log was not delivered: {why}")]
    Undelivered {
        /// What the command ended with.
        code: u8,
        /// What is in the way.
        why: String,
    },
    /// The system refused something the agent needs: a pipe, a signal handler, a thread.
    #[error("cannot set up the supervision of the command")]
    System(#[from] io::Error),
}

/// Exit code of a failure of the agent itself, which no command should use.
pub const EXIT_FAILURE: u8 = 125;

/// Exit code of a command that exists but cannot be executed, as in a shell.
pub const EXIT_NOT_EXECUTABLE: u8 = 126;

/// Exit code of a command that does not exist, as in a shell.
pub const EXIT_NOT_FOUND: u8 = 127;

/// Exit code when TERM came before the command was started: 128 + 15.
pub const EXIT_TERMINATED: u8 = 143;

impl Failure {
    /// What the agent exits with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_)
            | Self::Install(_)
            | Self::Print(_)
            | Self::Refused(_)
            | Self::System(_)
            | Self::Terminal(_)
            | Self::Undelivered { .. } => EXIT_FAILURE,
        }
    }

    /// In words, with what caused it.
    #[must_use]
    pub fn with_causes(&self) -> String {
        let causes = successors(self.source(), |&cause| cause.source());
        causes.fold(self.to_string(), |text, cause| format!("{text}: {cause}"))
    }
}
