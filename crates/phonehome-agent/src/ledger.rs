//! Where facts and output go: to a server, only to the agent's own streams, or past it.

use phonehome_env::Env;
use phonehome_proto::{
    event::{Event, Terminated},
    frame::{CommandState, End, Usage},
};
use tokio::{sync::watch, time::Instant};
use tracing::warn;

use crate::{
    capture::{Capture, Waivers},
    cause,
    command::{Output, Sources},
    config::Config,
    console::{Console, Copier},
    failure::Failure,
    herald::Herald,
    line::Line,
    probe::output::OutputWatch,
    recorder::Recorder,
    supervisor::Capturing,
};

/// Where facts and output go.
pub(crate) struct Ledger {
    /// `None` without a server.
    pub(crate) line: Option<Line>,
    /// `None` when nobody looks at the output, or once somebody else writes.
    pub(crate) recorder: Option<Recorder>,
    pub(crate) herald: Herald,
}

/// What is read of a command, and who copies it.
pub(crate) struct Inputs {
    sources: Sources,
    copier: Option<Copier>,
}

impl Ledger {
    pub(crate) async fn open(config: &mut Config) -> Result<Self, Failure> {
        let env = Env::real();
        let (line, mut recorder) = match config.home.take() {
            Some(home) => {
                let (line, recorder) = Line::open(&env, home, &config.spool).await?;
                (Some(line), Some(recorder))
            }
            None => {
                warn!("no --url (PHONEHOME_URL): the command runs unobserved");
                (None, config.looks_at_output().then(|| Recorder::for_nobody(env.clone())))
            }
        };
        if let (Some(recorder), Some(redactor)) = (&mut recorder, &config.redactor) {
            recorder.redact(redactor.clone());
        }
        let herald = recorder.as_ref().map_or_else(|| Herald::new(env.nature).0, Recorder::herald);
        Ok(Self { line, recorder, herald })
    }

    /// Where the command will write to, made before the command is. Whatever can fail about it has not failed then.
    pub(crate) fn inputs(&self, config: &Config, console: &Console) -> Result<(Output, Option<Inputs>), Failure> {
        let (output, sources) = match (&self.recorder, config.supervision.pty) {
            (None, _) => return Ok((Output::Inherited, None)),
            (Some(_), Some(size)) => Sources::terminal(size).map_err(Failure::Terminal)?,
            (Some(_), None) => Sources::pipes(config.merge)?,
        };
        let copies = config.tee || self.line.is_none(); // somebody has to see it
        let copier = copies.then(|| console.spawn_copier()).transpose()?;
        Ok((output, Some(Inputs { sources, copier })))
    }

    /// Begins to read what the command writes.
    pub(crate) fn capture(
        &mut self,
        config: &Config,
        inputs: Option<Inputs>,
        watch: Option<OutputWatch>,
    ) -> Option<Capturing> {
        let (Inputs { mut sources, copier }, recorder) = (inputs?, self.recorder.take()?);
        let last_output =
            self.line.as_ref().map_or_else(|| watch::Sender::new(Instant::now()), |line| line.last_output.clone());
        let (waivers, waivers_rx) = watch::channel(Waivers::default());
        let (held, kept_open) = (sources.held(), sources.kept_open.take());
        let capture =
            Capture::new(sources, recorder, copier, config.redactor.clone(), last_output, waivers_rx).watched_by(watch);
        Some(Capturing { task: tokio::spawn(capture.run()), waivers, held, kept_open })
    }

    /// Ends the log: nothing more can be told.
    pub(crate) fn finish(
        &self,
        config: &Config,
        mut recorder: Option<Recorder>,
        end: End,
        terminated: Terminated,
        usage: Option<Usage>,
    ) {
        if let Some(reason) = cause::reason(&terminated) {
            cause::leave_message(&config.supervision.termination_log, &reason);
        }
        if let Some(recorder) = &mut recorder {
            recorder.catch_up(); // so that the last fact finds a place
        }
        self.herald.tell(Event::Terminated(terminated));
        if let Some(recorder) = recorder {
            recorder.finish(end, usage);
        }
    }

    pub(crate) fn tell_state(&self, state: CommandState) {
        if let Some(line) = &self.line {
            line.command.send_replace(state);
        }
    }
}
