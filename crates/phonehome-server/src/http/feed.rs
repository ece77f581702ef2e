//! A body that tells a build's log piece by piece: what is stored, and on request what comes, to the verdict.
//!
//! The connection asks for the next piece when there is room for it, so whoever reads slowly holds up nobody but itself:
//! what it has not read yet lies in the store. Reading is done where it may wait for the disk.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use axum::body::{Body, Bytes};
use futures_util::stream;
use phonehome_env::Env;
use phonehome_proto::id::{Attempt, StepName};
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{log::lines::Lines, readers::Readers, told::Told};
use crate::{
    builds::{Build, BuildLog, LogItem, LogRecord, Verdict, View, cursor::Cursor, expiry},
    report::Report,
    store::Spot,
};

/// What a reader gets.
#[derive(Debug)]
pub(crate) enum Form {
    /// JSON lines.
    Ndjson,
    /// Server-sent events.
    Sse,
    /// Text.
    Text(Lines),
}

/// What is read.
pub(crate) struct Wanted {
    pub(crate) build: Arc<Build>,
    pub(crate) view: View,
    /// Where in its first record an attempt begins.
    pub(crate) starts: BTreeMap<(StepName, Attempt), Spot>,
    pub(crate) form: Form,
    /// Whether to wait for what comes, to the verdict.
    pub(crate) follow: bool,
}

/// Whoever reads, and what it needs of the server.
pub(crate) struct Seat {
    pub(crate) env: Env,
    pub(crate) readers: Readers,
    /// Given back with the seat.
    pub(crate) _place: OwnedSemaphorePermit,
    pub(crate) shutdown: CancellationToken,
}

/// Bytes that make a piece. One item more may be in it: 64 KiB of control characters are 384 KiB of JSON.
const PIECE: usize = 64 * 1024;

/// How soon a reader that has seen everything looks again: a build that writes all the time is told in pieces that are
/// worth their while. A line that comes alone is told at once. All readers together look 50,000 times a second at most.
fn pace(readers: usize) -> Duration {
    let each = Duration::from_micros(20 * readers as u64);
    each.max(Duration::from_millis(1))
}

/// Silence after which a comment keeps proxies from closing a stream of events.
const HEARTBEAT: Duration = Duration::from_secs(15);

struct Feed {
    /// With the reader while it is not at work.
    teller: Option<Teller>,
    seat: Seat,
    changes: watch::Receiver<u64>,
    build: Arc<Build>,
    follow: bool,
    /// Whether silence is broken by comments.
    beats: bool,
    last_piece: Instant,
    ended: bool,
}

/// Reads and tells, where it may wait for the disk.
struct Teller {
    build: Arc<Build>,
    log: BuildLog,
    starts: BTreeMap<(StepName, Attempt), Spot>,
    reports: u64,
    form: Form,
}

/// The body that tells this.
pub(crate) fn body(wanted: Wanted, seat: Seat) -> Body {
    let Wanted { build, view, starts, form, follow } = wanted;
    let changes = build.changes();
    let beats = matches!(form, Form::Sse);
    let reports = view.from.reports;
    let teller = Teller { log: BuildLog::view(build.clone(), view), build: build.clone(), starts, reports, form };
    let last_piece = Instant::now();
    let feed = Feed { teller: Some(teller), seat, changes, build, follow, beats, last_piece, ended: false };
    Body::from_stream(stream::unfold(feed, async |mut feed| feed.next().await.map(|piece| (piece, feed))))
}

impl Feed {
    /// The next piece; an error ends the body in a way that the client sees.
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        let shutdown = self.seat.shutdown.clone();
        let piece = tokio::select! {
            biased; // a body that is cut is seen to be
            () = shutdown.cancelled() => Err(io::Error::other("the server shuts down")),
            piece = self.piece() => piece,
        };
        self.ended |= piece.is_err();
        self.last_piece = Instant::now();
        match piece {
            Ok(piece) if piece.is_empty() => None,
            Ok(piece) => Some(Ok(piece)),
            Err(error) => {
                if !shutdown.is_cancelled() {
                    tracing::error!(build = %self.build.id, "a reader is cut off, the log cannot be read: {error}");
                }
                Some(Err(error))
            }
        }
    }

    /// The next piece, once there is one; empty at the end.
    async fn piece(&mut self) -> io::Result<Bytes> {
        loop {
            self.changes.mark_unchanged();
            let verdict = self.build.known_verdict(); // what is stored by then is all there is
            let piece = self.tell(None).await?;
            if !piece.is_empty() {
                return Ok(piece);
            }
            if verdict.is_some() || !self.follow {
                self.ended = true;
                return self.tell(Some(verdict)).await;
            }
            let beat = self.beats.then_some(self.last_piece + HEARTBEAT);
            tokio::select! {
                changed = self.changes.changed() => if changed.is_err() {
                    return Err(io::ErrorKind::BrokenPipe.into());
                },
                () = expiry(beat) => return Ok(Bytes::from_static(b":\n\n")),
            }
            sleep_until(self.last_piece + pace(self.seat.readers.count())).await;
        }
    }

    /// Tells what is stored, or the end.
    async fn tell(&mut self, end: Option<Option<Verdict>>) -> io::Result<Bytes> {
        let turn = self.seat.readers.turn().await;
        let Some(mut teller) = self.teller.take() else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let work = move || {
            let mut out = Vec::new();
            let told = match end {
                None => teller.tell(&mut out),
                Some(verdict) => {
                    teller.end(verdict.as_ref(), &mut out);
                    Ok(())
                }
            };
            drop(turn);
            (told.map(|()| out.into()), teller)
        };
        let (told, teller) = self.seat.env.blocking(work).await;
        self.teller = Some(teller);
        told
    }
}

impl Teller {
    /// Tells what is stored, up to about [`PIECE`] bytes of it.
    fn tell(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        let reports = self.build.reports();
        while out.len() < PIECE {
            if let Some(report) = self.next_report(&reports)? {
                self.reports += 1;
                self.tell_report(report, out);
            } else if let Some(item) = self.log.try_next()? {
                self.tell_item(item, out);
            } else {
                break;
            }
        }
        Ok(())
    }

    /// The next report, when it comes before the next item of the log.
    fn next_report<'a>(&mut self, reports: &'a [Arc<Report>]) -> io::Result<Option<&'a Report>> {
        let Some(report) = reports.get(self.reports as usize).filter(|_| matches!(self.form, Form::Sse)) else {
            return Ok(None);
        };
        let is_next = self.log.peek_time()?.is_none_or(|time| report.time <= time);
        Ok(is_next.then_some(&**report))
    }

    fn tell_report(&mut self, report: &Report, out: &mut Vec<u8>) {
        let behind = self.position();
        Told::report(report, &behind).write_event(&behind, out);
    }

    fn tell_item(&mut self, mut item: LogItem, out: &mut Vec<u8>) {
        if !self.starts.is_empty() && self.cut(&mut item) {
            return;
        }
        if let Form::Text(lines) = &mut self.form {
            return match item {
                LogItem::Lost { step, attempt, records } => lines.lost(&step, attempt, records, out),
                LogItem::Record(LogRecord { step, attempt, record }) => {
                    lines.push(&step, attempt, record.time, &record.payload, out);
                }
            };
        }
        let behind = self.position();
        match self.form {
            Form::Ndjson => Told::item(&item, &behind).write_line(out),
            Form::Sse | Form::Text(_) => Told::item(&item, &behind).write_event(&behind, out),
        }
    }

    /// Takes away what comes before the place where reading was to begin. Says whether that is all of the item.
    fn cut(&mut self, item: &mut LogItem) -> bool {
        let LogItem::Record(LogRecord { step, attempt, record }) = item else { return false };
        let start = self.starts.remove(&(step.clone(), *attempt));
        let Some(start) = start.filter(|start| start.seq == record.seq && start.skip > 0) else { return false };
        let skip = start.skip.min(record.payload.len());
        record.payload = record.payload.slice(skip..);
        record.offset += skip as u64;
        record.payload.is_empty()
    }

    fn end(&mut self, verdict: Option<&Verdict>, out: &mut Vec<u8>) {
        let mut behind = self.position();
        behind.ended = true;
        match (&mut self.form, verdict) {
            (Form::Text(lines), _) => lines.finish(out),
            (Form::Ndjson, Some(end)) => Told::End { end }.write_line(out),
            (Form::Sse, Some(end)) => Told::End { end }.write_event(&behind, out),
            (Form::Ndjson | Form::Sse, None) => {}
        }
    }

    fn position(&self) -> Cursor {
        let mut position = self.log.position();
        position.reports = self.reports;
        position
    }
}

#[cfg(test)]
mod tests;
