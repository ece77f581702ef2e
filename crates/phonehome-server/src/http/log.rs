//! `GET builds/{id}/log`: the raw file in ranges, or the log as it is told: merged, with times, as JSON, followed.

pub(crate) mod lines;
mod range;

use std::{collections::BTreeMap, io, str::FromStr, sync::Arc};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use futures_util::stream;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{
        ACCEPT_RANGES, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE,
        RANGE, X_CONTENT_TYPE_OPTIONS,
    },
};
use phonehome_proto::{
    frame::{FinishedAck, Stream},
    id::{Attempt, StepName},
};

use self::{
    lines::{Decoration, Lines},
    range::wanted,
};
use super::{
    auth::Caller,
    feed::{self, Form, Seat, Wanted},
    live::seat,
    params::{Named, Query, wrong},
    problem::Problem,
};
use crate::{
    builds::{
        Build, Order, Streams, View,
        cursor::{Cursor, Place},
    },
    serve::Standing,
    store::{AttemptFiles, BLOCK, Slice, Spot, Start, Tail},
    summary::kind,
};

/// What is asked for, each parameter understood.
#[derive(Debug, Default, PartialEq)]
struct Ask {
    step: Option<StepName>,
    attempt: Option<Attempt>,
    stream: Option<Stream>,
    from: Option<u64>,
    tail: Option<u64>,
    timestamps: bool,
    format: Format,
    follow: bool,
    cursor: Option<String>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Format {
    Ndjson,
    #[default]
    Text,
}

impl FromStr for Format {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "ndjson" => Ok(Self::Ndjson),
            "text" => Ok(Self::Text),
            _ => Err("it is text or ndjson"),
        }
    }
}

/// A stream of output, by name.
struct OutputStream(Stream);

impl FromStr for OutputStream {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stdout" => Ok(Self(Stream::Stdout)),
            "stderr" => Ok(Self(Stream::Stderr)),
            _ => Err("it is stdout or stderr"),
        }
    }
}

impl Ask {
    fn parse(mut query: Query) -> Result<Self, Problem> {
        let ask = Self {
            step: query.value("step")?,
            attempt: query.value("attempt")?,
            stream: query.value("stream")?.map(|OutputStream(stream)| stream),
            from: query.value("from")?,
            tail: query.value("tail")?,
            timestamps: query.switch("timestamps")?,
            format: query.value("format")?.unwrap_or_default(),
            follow: query.switch("follow")?,
            cursor: query.text("cursor")?,
        };
        query.end()?;
        ask.check()
    }

    /// Refuses what makes no sense together.
    fn check(self) -> Result<Self, Problem> {
        let beginnings =
            [("cursor", self.cursor.is_some()), ("from", self.from.is_some()), ("tail", self.tail.is_some())];
        let mut given = beginnings.iter().filter(|(_, is_given)| *is_given);
        if let (Some((first, _)), Some((second, _))) = (given.next(), given.next()) {
            return Err(wrong(second, &format!("it says where to begin, and so does {first}")));
        }
        if self.timestamps && self.format == Format::Ndjson {
            return Err(wrong("timestamps", "every line of format=ndjson has its time"));
        }
        Ok(self)
    }

    /// Whether the bytes are wanted as they lie on the disk.
    fn is_raw(&self) -> bool {
        !self.timestamps && !self.follow && self.format == Format::Text && self.cursor.is_none()
    }
}

/// The attempts that are to be read: one, or the newest one of every step.
struct Chosen {
    attempts: Vec<Arc<AttemptFiles>>,
    /// How many attempts the step has, when it is one.
    count: usize,
    /// The step, when it is one.
    step: Option<StepName>,
}

/// `GET builds/{id}/log`.
pub(crate) async fn log(
    State(standing): State<Arc<Standing>>,
    caller: Caller,
    Named(id): Named,
    query: Query,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    caller.may_read()?;
    let ask = Ask::parse(query)?;
    let build = standing.known(&id).await?;
    let chosen = choose(&ask, &build)?;
    let described = describe(&build, &chosen);
    let seat = seat(&standing)?;
    let mut response = match chosen.attempts.as_slice() {
        [files] if ask.is_raw() && chosen.step.is_some() => raw(&ask, files.clone(), seat, &method, &headers).await?,
        _ => told(ask, build, chosen, seat, &method).await?,
    };
    response.headers_mut().extend(described);
    Ok(response)
}

fn choose(ask: &Ask, build: &Build) -> Result<Chosen, Problem> {
    let steps = &build.declaration.steps;
    let attempts: Vec<_> = build.attempts().into_iter().map(|(files, _)| files).collect();
    let step = match (&ask.step, steps.as_slice()) {
        (Some(step), _) if steps.contains(step) => Some(step.clone()),
        (Some(step), _) => return Err(Problem::not_found(format!("build {} has no step {step}", build.id))),
        (None, [only]) => Some(only.clone()),
        (None, _) => None,
    };
    let newest =
        |step: &StepName| attempts.iter().filter(|files| files.step == *step).max_by_key(|files| files.attempt);
    let Some(step) = step else {
        let needs_step = [("attempt", ask.attempt.is_some()), ("from", ask.from.is_some())];
        if let Some((name, _)) = needs_step.into_iter().find(|(_, is_given)| *is_given) {
            return Err(wrong(name, "the build has several steps: say which one is meant, by step"));
        }
        return Ok(Chosen { attempts: steps.iter().filter_map(newest).cloned().collect(), count: 0, step: None });
    };
    let of_step = || attempts.iter().filter(|files| files.step == step);
    let files = match ask.attempt {
        None => newest(&step),
        Some(attempt) => match of_step().find(|files| files.attempt == attempt) {
            None => return Err(Problem::not_found(format!("step {step} has no attempt {attempt}"))),
            found => found,
        },
    };
    Ok(Chosen { attempts: files.cloned().into_iter().collect(), count: of_step().count(), step: Some(step) })
}

/// What the headers say of every answer.
fn describe(build: &Build, chosen: &Chosen) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let mut say = |name: &'static str, value: String| {
        if let Ok(value) = HeaderValue::from_str(&value) {
            headers.insert(HeaderName::from_static(name), value);
        }
    };
    let verdict = build.known_verdict();
    let complete = match (&chosen.step, chosen.attempts.as_slice()) {
        (Some(step), attempts) => {
            say("phonehome-step", step.to_string());
            say("phonehome-attempts", chosen.count.to_string());
            attempts.first().and_then(|files| {
                say("phonehome-attempt", files.attempt.to_string());
                let progress = files.progress.borrow();
                let answer = progress.finished.as_ref().map(|(_, answer)| *answer == FinishedAck::Complete);
                answer.or(verdict.as_ref().map(|_| false))
            })
        }
        (None, _) => verdict.as_ref().map(crate::builds::Verdict::is_complete),
    };
    complete.into_iter().for_each(|complete| say("phonehome-complete", complete.to_string()));
    verdict.iter().for_each(|verdict| say("phonehome-verdict", kind(&verdict.outcome).to_owned()));
    // What a build writes is never to be taken for a page of this server.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    headers
}

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
const NDJSON: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// Answers with bytes as they lie on the disk.
async fn raw(
    ask: &Ask,
    files: Arc<AttemptFiles>,
    seat: Seat,
    method: &Method,
    headers: &HeaderMap,
) -> Result<Response, Problem> {
    let start = match ask.tail {
        Some(lines) => tail(&seat, std::slice::from_ref(&files), ask.stream, lines).await?.first().copied(),
        None => None,
    };
    let stream = ask.stream;
    let slice = seat.env.blocking(move || Slice::open(&files, stream)).await?;
    let skipped = match (start, ask.from) {
        (Some(start), _) => slice.len().saturating_sub(start.from_end),
        (None, from) => from.unwrap_or(0).min(slice.len()),
    };
    let len = slice.len() - skipped;
    let tag = HeaderValue::from_str(&format!("\"{}-{skipped}\"", slice.tag())).map_err(io::Error::other)?;
    let mut response = Response::new(Body::empty());
    let told = response.headers_mut();
    told.insert(CONTENT_TYPE, TEXT);
    told.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    told.insert(ETAG, tag.clone());
    if is_known(headers, &tag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    let part = match asked_range(method, headers, &tag).map_or(range::Wanted::Everything, |range| wanted(range, len)) {
        range::Wanted::Unsatisfiable => {
            let mut response = Problem::unsatisfiable(format!("the log has {len} bytes")).into_response();
            response.headers_mut().insert(CONTENT_RANGE, content_range(None, len)?);
            return Ok(response);
        }
        range::Wanted::Part(part) => {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            response.headers_mut().insert(CONTENT_RANGE, content_range(Some((part.start, part.end)), len)?);
            part
        }
        range::Wanted::Everything => 0..len,
    };
    if let Some(digest) = slice.digest().filter(|_| skipped == 0) {
        let digest = format!("blake3=:{}:", STANDARD.encode(digest.0));
        let digest = HeaderValue::from_str(&digest).map_err(io::Error::other)?;
        if part == (0..len) {
            response.headers_mut().insert("content-digest", digest.clone());
        }
        response.headers_mut().insert("repr-digest", digest);
    }
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(part.end - part.start));
    if *method != Method::HEAD {
        *response.body_mut() = bytes(slice, skipped + part.start, skipped + part.end, seat);
    }
    Ok(response)
}

/// Whether the client has these bytes already (RFC 9110, section 13.1.2).
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let given = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let mut tags = given.flat_map(|value| value.split(',')).map(str::trim);
    tags.any(|given| given == "*" || Some(given.strip_prefix("W/").unwrap_or(given)) == tag.to_str().ok())
}

/// The range that is asked for, unless it is meant for other bytes than these (RFC 9110, section 13.1.5).
fn asked_range<'a>(method: &Method, headers: &'a HeaderMap, tag: &HeaderValue) -> Option<&'a str> {
    let is_for_these = headers.get(IF_RANGE).is_none_or(|given| given == tag);
    let range = headers.get(RANGE).filter(|_| *method == Method::GET && is_for_these)?;
    range.to_str().ok()
}

fn content_range(part: Option<(u64, u64)>, len: u64) -> Result<HeaderValue, Problem> {
    let text = match part {
        Some((start, end)) => format!("bytes {start}-{}/{len}", end - 1),
        None => format!("bytes */{len}"),
    };
    HeaderValue::from_str(&text).map_err(|error| io::Error::other(error).into())
}

/// The bytes from one place to another, block by block.
fn bytes(slice: Slice, start: u64, end: u64, seat: Seat) -> Body {
    Body::from_stream(stream::try_unfold((slice, start, seat), move |(slice, at, seat)| block(slice, at, end, seat)))
}

/// A block of bytes, and from where to go on.
async fn block(
    mut slice: Slice,
    at: u64,
    end: u64,
    seat: Seat,
) -> io::Result<Option<(axum::body::Bytes, (Slice, u64, Seat))>> {
    if at >= end {
        return Ok(None);
    }
    let turn = seat.readers.turn().await;
    let max = usize::try_from(end - at).unwrap_or(BLOCK).min(BLOCK);
    let work = move || {
        let block = slice.read(at, max);
        drop(turn);
        (block, slice)
    };
    let (block, slice) = seat.env.blocking(work).await;
    let block = block?;
    let next = at + block.len() as u64;
    Ok(Some((block, (slice, next, seat))))
}

/// Where the last lines of attempts begin that are read as one log.
async fn tail(
    seat: &Seat,
    attempts: &[Arc<AttemptFiles>],
    stream: Option<Stream>,
    lines: u64,
) -> Result<Vec<Start>, Problem> {
    let attempts = attempts.to_vec();
    let mut tail = seat.env.blocking(move || Tail::new(&attempts, stream, lines)).await?;
    loop {
        let turn = seat.readers.turn().await;
        let work = move || {
            let found = tail.advance();
            drop(turn);
            (found, tail)
        };
        let (found, rest) = seat.env.blocking(work).await;
        match found? {
            Some(starts) => return Ok(starts),
            None => tail = rest,
        }
    }
}

/// Answers with the log as it is told.
async fn told(ask: Ask, build: Arc<Build>, chosen: Chosen, seat: Seat, method: &Method) -> Result<Response, Problem> {
    let (from, starts) = beginning(&ask, &build, &chosen, &seat).await?;
    let decoration = Decoration { step: chosen.step.is_none(), time: ask.timestamps };
    let (form, content_type, everything) = match ask.format {
        Format::Ndjson => (Form::Ndjson, NDJSON, Streams::All),
        Format::Text => (Form::Text(Lines::new(decoration)), TEXT, Streams::Output),
    };
    let streams = ask.stream.map_or(everything, Streams::Only);
    let view = View { order: Order::Time, streams, from, until: until(&ask, &build, &chosen) };
    let wanted = Wanted { build, view, starts, form, follow: ask.follow };
    let body = if *method == Method::HEAD { Body::empty() } else { feed::body(wanted, seat) };
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    Ok(response)
}

/// Where to begin: a place in each step, and in the first record there.
async fn beginning(
    ask: &Ask,
    build: &Build,
    chosen: &Chosen,
    seat: &Seat,
) -> Result<(Cursor, BTreeMap<(StepName, Attempt), Spot>), Problem> {
    if let Some(text) = &ask.cursor {
        let cursor = build.cursor(text).map_err(|error| wrong("cursor", &error.to_string()))?;
        return Ok((cursor, BTreeMap::new()));
    }
    let spots = spots(ask, chosen, seat).await?;
    let (mut cursor, mut starts) = (build.start(), BTreeMap::new());
    for (files, spot) in chosen.attempts.iter().zip(spots) {
        if let Some(index) = build.declaration.steps.iter().position(|step| *step == files.step) {
            cursor.set_place(index, Place { attempt: files.attempt, next: spot.seq });
            starts.insert((files.step.clone(), files.attempt), spot);
        }
    }
    Ok((cursor, starts))
}

async fn spots(ask: &Ask, chosen: &Chosen, seat: &Seat) -> Result<Vec<Spot>, Problem> {
    if let Some(lines) = ask.tail {
        let starts = tail(seat, &chosen.attempts, ask.stream, lines).await?;
        return Ok(starts.into_iter().map(|start| start.spot).collect());
    }
    match (ask.from, chosen.attempts.first()) {
        (Some(from), Some(files)) => {
            let (files, stream) = (files.clone(), ask.stream);
            let spot = seat.env.blocking(move || Slice::open(&files, stream)?.locate(from)).await?;
            Ok(vec![spot])
        }
        (Some(_) | None, _) => Ok(vec![Spot { seq: 0, skip: 0 }; chosen.attempts.len()]),
    }
}

/// Where to end: at what is stored now, or with the build.
fn until(ask: &Ask, build: &Build, chosen: &Chosen) -> Option<Vec<Place>> {
    let whole = Place { attempt: Attempt::MAX, next: u64::MAX };
    let place = |step: &StepName| {
        if chosen.step.as_ref().is_some_and(|chosen| chosen != step) {
            return Place::default();
        }
        let files = chosen.attempts.iter().find(|files| files.step == *step);
        match files {
            Some(files) if !ask.follow => Place { attempt: files.attempt, next: files.progress.borrow().next },
            Some(files) if ask.attempt.is_some() => Place { attempt: files.attempt, next: u64::MAX },
            None if !ask.follow => Place::default(),
            Some(_) | None => whole,
        }
    };
    Some(build.declaration.steps.iter().map(place).collect())
}
