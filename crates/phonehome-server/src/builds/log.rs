//! The log of a whole build, read from the store.

use std::{collections::VecDeque, io, sync::Arc};

use phonehome_proto::{
    frame::{Record, Stream, UnixMicros},
    id::{Attempt, StepName},
};
use tokio::sync::watch;

use super::{
    Build,
    cursor::{Cursor, Place},
};
use crate::store::{AttemptFiles, AttemptReader, Found, Next};

/// A record and the attempt it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// The step.
    pub step: StepName,
    /// Which life of the step's agent.
    pub attempt: Attempt,
    /// The record.
    pub record: Record,
}

/// What a reader of a build's log comes upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogItem {
    /// Records were acknowledged once and are gone: how many.
    Lost {
        /// The step.
        step: StepName,
        /// Which life of its agent.
        attempt: Attempt,
        /// How many.
        records: u64,
    },
    /// A record.
    Record(LogRecord),
}

/// A cursor over all attempts of a build. It reads what is stored, at its own pace, and holds nobody up.
#[derive(Debug)]
pub struct BuildLog {
    build: Arc<Build>,
    changed: watch::Receiver<u64>,
    order: Order,
    streams: Streams,
    /// Where it began, and how far the steps have got that have no reader.
    from: Cursor,
    until: Option<Vec<Place>>,
    /// How many of the build's attempts were taken up.
    known: usize,
    steps: Vec<StepReader>,
    /// The step that is read.
    at: usize,
    turn: Turn,
}

/// What of a build's log is wanted, and how.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub(crate) order: Order,
    pub(crate) streams: Streams,
    /// Where to begin.
    pub(crate) from: Cursor,
    /// Where to end: per step, in the order of declaration. Nothing is read of a step that is not in it. `None` is to
    /// read whatever comes.
    pub(crate) until: Option<Vec<Place>>,
}

/// How several steps become one log. Each step's order is always kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// By the time of the records, among what is stored at the moment of reading.
    Time,
    /// A part of each in turn, so that none keeps the others from being read.
    Turns,
}

/// Which streams are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Streams {
    /// Output and events.
    All,
    /// One.
    Only(Stream),
    /// What the command wrote.
    Output,
}

impl Streams {
    pub(crate) fn has(self, stream: Stream) -> bool {
        match self {
            Self::All => true,
            Self::Only(wanted) => stream == wanted,
            Self::Output => stream.is_output(),
        }
    }
}

/// Reads the attempts of one step, one after the other.
#[derive(Debug)]
struct StepReader {
    step: StepName,
    /// Its number in the declaration.
    index: Option<usize>,
    /// Never empty. All but the last can store nothing more.
    attempts: VecDeque<Arc<AttemptFiles>>,
    /// Of the first one; closed while there is nothing to be expected of it.
    reader: Option<AttemptReader>,
    place: Place,
    until: Place,
}

/// What is left of a step's turn: a step that writes much must not keep the others from being read.
#[derive(Debug)]
struct Turn {
    records: usize,
    bytes: usize,
}

impl BuildLog {
    /// A cursor at the beginning.
    pub(super) fn new(build: Arc<Build>) -> Self {
        let from = build.start();
        Self::view(build, View { order: Order::Turns, streams: Streams::All, from, until: None })
    }

    /// Goes on behind what a cursor of this build says was told.
    #[cfg(test)]
    pub(crate) fn resume(build: Arc<Build>, from: Cursor) -> Self {
        Self::view(build, View { order: Order::Time, streams: Streams::All, from, until: None })
    }

    /// A part of the log.
    pub(crate) fn view(build: Arc<Build>, View { order, streams, from, until }: View) -> Self {
        let changed = build.changed.subscribe();
        Self { changed, build, order, streams, from, until, known: 0, steps: Vec::new(), at: 0, turn: Turn::NEW }
    }

    /// Behind what was returned so far.
    pub(crate) fn position(&self) -> Cursor {
        let mut position = self.from.clone();
        for reader in &self.steps {
            if let Some(index) = reader.index {
                position.set_place(index, reader.place);
            }
        }
        position
    }

    /// The next item: each step's in order, one attempt after the other, and the steps in turns. `None` when the build
    /// has its verdict and everything stored was read. Cancel safe.
    ///
    /// # Errors
    ///
    /// When the store's files cannot be read.
    pub async fn next(&mut self) -> io::Result<Option<LogItem>> {
        loop {
            self.changed.mark_unchanged();
            let ended = self.build.verdict.borrow().is_some();
            if let Some(item) = self.try_next()? {
                return Ok(Some(item));
            }
            if ended || self.changed.changed().await.is_err() {
                return Ok(None);
            }
        }
    }

    /// The next item, if there is one at this moment.
    ///
    /// # Errors
    ///
    /// When the store's files cannot be read.
    pub fn try_next(&mut self) -> io::Result<Option<LogItem>> {
        self.take_up_new_attempts();
        match self.order {
            Order::Time => self.next_by_time(),
            Order::Turns => self.next_in_turn(),
        }
    }

    /// When the next item was written, if there is one at this moment; 0 for one without a time.
    ///
    /// # Errors
    ///
    /// When the store's files cannot be read.
    pub(crate) fn peek_time(&mut self) -> io::Result<Option<UnixMicros>> {
        self.take_up_new_attempts();
        Ok(self.earliest()?.map(|(time, _)| time))
    }

    fn next_in_turn(&mut self) -> io::Result<Option<LogItem>> {
        // Once around, and back to a step that has had its turn and may be the only one.
        for _ in 0..=self.steps.len() {
            let Some(step) = self.steps.get_mut(self.at) else { break };
            if !self.turn.is_over()
                && let Some(item) = step.next(self.streams)?
            {
                self.turn.take(&item);
                return Ok(Some(item));
            }
            self.at = (self.at + 1) % self.steps.len();
            self.turn = Turn::NEW;
        }
        Ok(None)
    }

    fn next_by_time(&mut self) -> io::Result<Option<LogItem>> {
        let streams = self.streams;
        let Some((_, step)) = self.earliest()? else { return Ok(None) };
        step.next(streams)
    }

    /// The step whose next item is the oldest, and its time. A hole has none: it comes at once.
    fn earliest(&mut self) -> io::Result<Option<(UnixMicros, &mut StepReader)>> {
        let mut earliest: Option<(UnixMicros, &mut StepReader)> = None;
        for step in &mut self.steps {
            let time = match step.peek(self.streams)? {
                Some(Next::Record { time, .. }) => time,
                Some(Next::Lost { .. }) => 0,
                None => continue,
            };
            if earliest.as_ref().is_none_or(|(known, _)| time < *known) {
                earliest = Some((time, step));
            }
        }
        Ok(earliest)
    }

    fn take_up_new_attempts(&mut self) {
        let inner = self.build.lock();
        for files in inner.attempts.iter().skip(self.known) {
            match self.steps.iter_mut().find(|known| known.step == files.step) {
                Some(known) => known.add(files.clone()),
                None => {
                    let index = self.build.declaration.steps.iter().position(|step| *step == files.step);
                    let place = index.map(|index| self.from.place(index)).unwrap_or_default();
                    let until = until(self.until.as_deref(), index);
                    self.steps.extend(StepReader::new(files.clone(), index, place, until));
                }
            }
        }
        self.known = inner.attempts.len();
    }
}

/// Where to end in a step.
fn until(places: Option<&[Place]>, index: Option<usize>) -> Place {
    let everything = Place { attempt: Attempt::MAX, next: u64::MAX };
    places.map_or(everything, |places| index.and_then(|index| places.get(index)).copied().unwrap_or_default())
}

impl StepReader {
    /// Nothing when this attempt is one of those that were told.
    fn new(files: Arc<AttemptFiles>, index: Option<usize>, place: Place, until: Place) -> Option<Self> {
        let step = files.step.clone();
        let attempts = VecDeque::new();
        let mut reader = Self { step, index, attempts, reader: None, place, until };
        reader.add(files);
        (!reader.attempts.is_empty()).then_some(reader)
    }

    /// Takes up an attempt, in the order of their numbers. One that was passed already had nothing more to tell.
    fn add(&mut self, files: Arc<AttemptFiles>) {
        if files.attempt >= self.place.attempt {
            let at = self.attempts.partition_point(|known| known.attempt < files.attempt);
            self.attempts.insert(at, files);
        }
    }

    fn next(&mut self, streams: Streams) -> io::Result<Option<LogItem>> {
        if self.peek(streams)?.is_none() {
            return Ok(None);
        }
        let Some(reader) = &mut self.reader else { return Ok(None) };
        let found = reader.next()?;
        self.place.next = reader.told();
        Ok(found.map(|found| item(&reader.files, found)))
    }

    /// What comes next, after what is not wanted.
    fn peek(&mut self, streams: Streams) -> io::Result<Option<Next>> {
        while let Some(next) = self.look()? {
            match next {
                Next::Record { stream, .. } if !streams.has(stream) => self.skip()?,
                Next::Record { .. } | Next::Lost { .. } => return Ok(Some(next)),
            }
        }
        Ok(None)
    }

    fn skip(&mut self) -> io::Result<()> {
        if let Some(reader) = &mut self.reader {
            reader.skip()?;
            self.place.next = reader.told();
        }
        Ok(())
    }

    /// What comes next before the end of what is wanted.
    fn look(&mut self) -> io::Result<Option<Next>> {
        while let Some(files) = self.attempts.front().filter(|files| files.attempt <= self.until.attempt).cloned() {
            if self.has_more(&files) {
                let Some(next) = self.open(&files)?.peek()? else { break };
                let is_wanted = files.attempt < self.until.attempt || next.seq() < self.until.next;
                return Ok(is_wanted.then_some(next));
            }
            if self.attempts.len() == 1 {
                break;
            }
            self.attempts.pop_front(); // nothing was added to it since its successor was made
            self.reader = None;
        }
        Ok(None)
    }

    /// Whether there is anything to be read of the first attempt. When it has ended and there is not, its files are
    /// closed: a build may have many steps, and many readers.
    fn has_more(&mut self, files: &AttemptFiles) -> bool {
        let told = if self.place.attempt == files.attempt { self.place.next } else { 0 };
        let progress = files.progress.borrow();
        let has_more = told < progress.next;
        if !has_more && progress.finished.is_some() {
            self.reader = None;
        }
        has_more
    }

    /// The reader of the first attempt.
    fn open(&mut self, files: &Arc<AttemptFiles>) -> io::Result<&mut AttemptReader> {
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => {
                if self.place.attempt != files.attempt {
                    self.place = Place { attempt: files.attempt, next: 0 };
                }
                let mut reader = AttemptReader::open(files.clone())?;
                if self.place.next > 0 {
                    reader.seek(self.place.next)?;
                }
                reader
            }
        };
        Ok(self.reader.insert(reader))
    }
}

impl Turn {
    const NEW: Self = Self { records: 64, bytes: 256 * 1024 };

    fn is_over(&self) -> bool {
        self.records == 0 || self.bytes == 0
    }

    fn take(&mut self, item: &LogItem) {
        let bytes = match item {
            LogItem::Lost { .. } => 0,
            LogItem::Record(found) => found.record.payload.len(),
        };
        self.records = self.records.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

fn item(files: &AttemptFiles, found: Found) -> LogItem {
    let (step, attempt) = (files.step.clone(), files.attempt);
    match found {
        Found::Record(record) => LogItem::Record(LogRecord { step, attempt, record }),
        Found::Lost(records) => LogItem::Lost { step, attempt, records },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::scene::{Agent, Scene};

    /// What may happen while somebody reads.
    #[derive(Debug, Clone)]
    enum Act {
        /// The newest agent of a step writes a record.
        Write { step: usize, time: u8 },
        /// A new agent of a step comes.
        Replace { step: usize },
        /// What it sent behind this many records is taken back, and sent again.
        Resend { step: usize, kept: usize },
        /// The reader reads so many items.
        Read(usize),
        /// The reader goes, and another comes with its cursor, as text.
        Resume,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (0..2_usize, 0..9_u8).prop_map(|(step, time)| Act::Write { step, time }),
            1 => (0..2_usize).prop_map(|step| Act::Replace { step }),
            1 => (0..2_usize, 0..9_usize).prop_map(|(step, kept)| Act::Resend { step, kept }),
            3 => (0..5_usize).prop_map(Act::Read),
            2 => Just(Act::Resume),
        ]
    }

    const STEPS: [&str; 2] = ["a", "b"];

    /// A step's agents and what they wrote.
    #[derive(Default)]
    struct Actor {
        agent: Option<Agent>,
        producer: u8,
        /// Time and text of each record of the newest.
        written: Vec<(u64, String)>,
        /// Everything, over all attempts.
        all: Vec<String>,
    }

    impl Actor {
        async fn replace(&mut self, scene: &Scene, step: usize) {
            self.producer += 1;
            self.agent = Some(scene.agent(step as u8 * 100 + self.producer, STEPS[step]).await);
            self.written.clear();
        }

        async fn send(&mut self, scene: &Scene, from: usize) {
            let Some(agent) = &mut self.agent else { return };
            for (time, text) in &self.written[from..] {
                scene.write(agent, &[(*time, Stream::Stdout, text.as_bytes())]).await;
            }
        }
    }

    async fn play(acts: &[Act], order: Order) {
        let scene = Scene::new(&STEPS);
        let mut actors: [Actor; 2] = Default::default();
        let view = |from| View { order, streams: Streams::All, from, until: None };
        let mut log = BuildLog::view(scene.build.clone(), view(scene.build.start()));
        let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut note = |item: LogItem| {
            let LogItem::Record(LogRecord { step, record, .. }) = item else { panic!("nothing is lost") };
            let text = String::from_utf8(record.payload.to_vec()).unwrap();
            told.entry(step.to_string()).or_default().push(text);
        };
        for act in acts {
            match *act {
                Act::Write { step, time } => {
                    let actor = &mut actors[step];
                    if actor.agent.is_none() {
                        actor.replace(&scene, step).await;
                    }
                    let text = format!("{step}/{}/{}", actor.producer, actor.written.len());
                    actor.written.push((time.into(), text.clone()));
                    actor.all.push(text);
                    actor.send(&scene, actor.written.len() - 1).await;
                }
                Act::Replace { step } => actors[step].replace(&scene, step).await,
                Act::Resend { step, kept } => {
                    let actor = &mut actors[step];
                    let kept = kept.min(actor.written.len());
                    if let Some(agent) = &mut actor.agent {
                        scene.take_back(agent, kept).await;
                    }
                    (0..2).for_each(|_| {
                        if let Some(item) = log.try_next().unwrap() {
                            note(item)
                        }
                    });
                    let position = log.position().to_string();
                    log = BuildLog::view(scene.build.clone(), view(position.parse().unwrap()));
                    actor.send(&scene, kept).await;
                }
                Act::Read(count) => {
                    (0..count).for_each(|_| {
                        if let Some(item) = log.try_next().unwrap() {
                            note(item)
                        }
                    });
                }
                Act::Resume => {
                    let position = scene.build.cursor(&log.position().to_string()).unwrap();
                    log = BuildLog::view(scene.build.clone(), view(position));
                }
            }
        }
        while let Some(item) = log.try_next().unwrap() {
            note(item);
        }
        for (step, actor) in STEPS.iter().zip(&actors) {
            assert_eq!(told.remove(*step).unwrap_or_default(), actor.all, "step {step}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn however_often_a_reader_stops_and_goes_on_it_reads_each_step_once_and_in_order(
            acts in prop::collection::vec(act(), 0..40),
            by_time: bool,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
            runtime.block_on(play(&acts, if by_time { Order::Time } else { Order::Turns }));
        }
    }

    #[tokio::test]
    async fn history_is_merged_by_time_and_each_step_keeps_its_order() {
        let scene = Scene::new(&STEPS);
        let (mut a, mut b) = (scene.agent(1, "a").await, scene.agent(2, "b").await);
        scene.write(&mut a, &[(1, Stream::Stdout, b"1"), (5, Stream::Stdout, b"5"), (4, Stream::Stdout, b"4")]).await;
        scene.write(&mut b, &[(2, Stream::Stdout, b"2"), (3, Stream::Stderr, b"3"), (9, Stream::Stdout, b"9")]).await;
        let log = BuildLog::resume(scene.build.clone(), scene.build.start());
        assert_eq!(texts(log), ["1", "2", "3", "5", "4", "9"]);
    }

    #[tokio::test]
    async fn a_part_of_a_log_ends_where_it_was_to_end() {
        let scene = Scene::new(&STEPS);
        let (mut a, mut b) = (scene.agent(1, "a").await, scene.agent(2, "b").await);
        let records: [(_, _, &[u8]); 3] =
            [(1, Stream::Stdout, b"out"), (2, Stream::Stderr, b"err"), (3, Stream::Event, b"{}")];
        scene.write(&mut a, &records).await;
        scene.write(&mut b, &records).await;
        let from = scene.build.start();
        let view = |streams, until| View { order: Order::Time, streams, from: from.clone(), until };
        let read = |view| texts(BuildLog::view(scene.build.clone(), view));
        let place = |next| Place { attempt: 1, next };
        assert_eq!(read(view(Streams::All, Some(vec![place(1)]))), ["out"], "nothing of the other step");
        assert_eq!(read(view(Streams::Only(Stream::Stderr), None)), ["err", "err"]);
        assert_eq!(read(view(Streams::Output, Some(vec![place(9), place(1)]))), ["out", "out", "err"]);
    }

    fn texts(mut log: BuildLog) -> Vec<String> {
        let items = std::iter::from_fn(|| log.try_next().unwrap());
        let text = |item| match item {
            LogItem::Record(found) => String::from_utf8(found.record.payload.to_vec()).unwrap(),
            LogItem::Lost { .. } => panic!("nothing is lost"),
        };
        items.map(text).collect()
    }
}
