//! What must be true after a run, read from the server's files by their documented layout alone.

use std::{cell::RefCell, collections::BTreeMap, path::Path, rc::Rc, time::Duration};

use phonehome_agent::Delivery;
use phonehome_proto::frame::{Stream, checksum};
use phonehome_server::{BuildLog, LogItem};
use serde_json::Value;

use crate::{
    disk::SimDisk,
    plan::Plan,
    trace::saw,
    world::{Agent, DATA, History, Source},
};

/// What one reader of a build's log has seen.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// The next number of each attempt.
    next: BTreeMap<u32, u64>,
    ended: bool,
    wrong: Option<String>,
}

/// Follows a log as the hook's printer does.
pub(crate) async fn read(mut log: BuildLog, reader: Rc<RefCell<Reader>>) {
    loop {
        let item = log.next().await;
        let mut reader = reader.borrow_mut();
        match item {
            Ok(Some(item)) => reader.see(&item),
            Ok(None) => {
                reader.ended = true;
                return;
            }
            Err(error) => {
                // Damage that appears under a running server is not planned; a dead disk is.
                crate::trace::note(&format!("a reader ends: {error}"));
                return;
            }
        }
    }
}

impl Reader {
    fn see(&mut self, item: &LogItem) {
        match item {
            LogItem::Lost { attempt, records, .. } => *self.next.entry(*attempt).or_default() += records,
            LogItem::Record(found) => {
                let next = self.next.entry(found.attempt).or_default();
                if found.record.seq != *next {
                    self.wrong.get_or_insert(format!("a reader got record {} for {next}", found.record.seq));
                }
                *next = found.record.seq + 1;
            }
        }
    }
}

/// An attempt as it is stored.
#[derive(Debug, Default)]
struct Stored {
    producer: String,
    finished: Option<Value>,
    /// One more than the last record.
    next: u64,
    holes: u64,
    /// Records that were damaged on their way.
    wrong: u64,
    gaps: [u64; 2],
    /// Where each stream has got to.
    offsets: [u64; 2],
}

const ENTRY: usize = 48;

pub(crate) fn judge(
    plan: &Plan,
    history: &History,
    agents: &[Agent],
    verdicts: &[Value],
    readers: &[Rc<RefCell<Reader>>],
    disk: &SimDisk,
) -> Result<(), String> {
    let Some(verdict) = verdicts.first() else { return Err("there is no verdict".into()) };
    if verdicts.iter().any(|other| other != verdict) {
        return Err(format!("the verdict changed: {verdicts:?}"));
    }
    let stored = attempts(disk, agents, history)?;
    for reader in readers {
        let reader = reader.borrow();
        if let Some(wrong) = &reader.wrong {
            return Err(wrong.clone());
        }
    }
    if history.unsynced {
        return Ok(()); // what is there is not wrong, and no more was promised
    }
    if let Some(reader) = readers.last().map(|reader| reader.borrow()).filter(|reader| reader.ended) {
        // An attempt that a newer one has displaced may have written more than it could sync, which nobody is shown.
        let (last, finished) = stored.iter().next_back().map_or((0, 0), |(last, stored)| (*last, stored.next));
        let seen = reader.next.get(&last).copied().unwrap_or_default();
        if seen != finished {
            return Err(format!("the last reader saw {seen} of {finished} records"));
        }
    }
    let kept = stored_verdict(disk);
    if kept.as_ref() != Some(verdict) {
        return Err(format!("{verdict} was told, {kept:?} is stored"));
    }
    for agent in agents {
        check_agent(
            plan,
            history,
            agents,
            agent,
            stored.values().find(|stored| Some(&stored.producer) == agent.producer().as_ref()),
        )?;
    }
    check_verdict(plan, history, agents, verdict, &stored)
}

fn check_verdict(
    plan: &Plan,
    history: &History,
    agents: &[Agent],
    verdict: &Value,
    stored: &BTreeMap<u32, Stored>,
) -> Result<(), String> {
    let last = stored.values().last();
    let finished = last.filter(|stored| stored.finished.is_some());
    let code = match verdict["verdict"].as_str() {
        Some("succeeded") => 0,
        Some("failed") => verdict["end"]["exited"].as_u64().unwrap_or(255) as u8,
        Some("lost") => {
            saw("lost");
            let delivered = agents.iter().any(Agent::is_delivered);
            let gave_up = plan.linger < Duration::from_secs(100);
            return if gave_up || !delivered { Ok(()) } else { Err("lost, but an agent delivered".into()) };
        }
        Some("timed-out") if !agents.iter().any(Agent::is_delivered) => return Ok(()),
        Some("error") if plan.harms_storage() && !agents.iter().any(Agent::is_delivered) => return Ok(()),
        _ => return Err(format!("nobody asked for {verdict}")),
    };
    let is_complete = verdict["incomplete"].is_null();
    let finished = finished.ok_or("a verdict without an end")?;
    let agent = agents.iter().find(|agent| agent.producer().as_ref() == Some(&finished.producer));
    let source = agent.ok_or("nobody wrote the finished attempt")?.source.borrow();
    if source.ended != Some(code) {
        return Err(format!("the verdict says {code}, the command {:?}", source.ended));
    }
    let total = source.written.each_ref().map(|bytes| bytes.len() as u64);
    if finished.offsets != total && finished.holes == 0 {
        return Err(format!("finished with {:?} of {total:?} bytes", finished.offsets));
    }
    let is_whole = finished.offsets == total && finished.gaps == [0; 2] && finished.holes + finished.wrong == 0;
    if is_complete && !is_whole && !history.damaged {
        return Err(format!("complete, but {finished:?} of {total:?}"));
    }
    if !is_complete {
        saw("incomplete");
        let excused = history.damaged || history.spool_failed || finished.gaps != [0; 2] || finished.wrong > 0;
        if !excused {
            return Err(format!("incomplete without a reason: {}", verdict["incomplete"]));
        }
    }
    Ok(())
}

/// What an agent's command wrote is stored as far as it can be.
fn check_agent(
    plan: &Plan,
    history: &History,
    agents: &[Agent],
    agent: &Agent,
    stored: Option<&Stored>,
) -> Result<(), String> {
    let source = agent.source.borrow();
    let stored_bytes = stored.map_or([0; 2], |stored| stored.offsets);
    if let Some(Some(Delivery::Complete)) = source.delivery {
        let total = source.written.each_ref().map(|bytes| bytes.len() as u64);
        if !history.damaged && stored_bytes != total {
            return Err(format!("agent {} was told that {stored_bytes:?} of {total:?} are complete", agent.life));
        }
    }
    check_spool(plan, history, agents, agent, &source, stored_bytes)
}

/// A spool that was kept has brought everything that was written a while before the agent's end.
fn check_spool(
    plan: &Plan,
    history: &History,
    agents: &[Agent],
    agent: &Agent,
    source: &Source,
    stored: [u64; 2],
) -> Result<(), String> {
    let Some(killed) = source.killed.filter(|_| plan.spool && !source.wiped) else { return Ok(()) };
    let excused = history.spool_failed || history.damaged || plan.has_rivals();
    let heir = agents.iter().any(|heir| {
        heir.life > agent.life
            && heir.disk.is(&agent.disk)
            && heir.source.borrow().delivery == Some(Some(Delivery::Complete))
    });
    let fits = (source.written.concat().len() + 300 * source.stamps.len()) as u64 <= plan.spool_limit;
    if excused || !heir || !fits {
        return Ok(());
    }
    let kept = source.stamps.iter().rev().find(|(at, _)| *at + KEPT_AFTER <= killed).map_or([0; 2], |(_, len)| *len);
    if (0..2).any(|at| stored[at] < kept[at] as u64) {
        return Err(format!("agent {} left {kept:?} bytes in its spool, {stored:?} got here", agent.life));
    }
    Ok(())
}

/// When what was written is in the spool for certain.
const KEPT_AFTER: Duration = Duration::from_secs(1);

/// The verdict on the server's disk.
pub(crate) fn stored_verdict(disk: &SimDisk) -> Option<Value> {
    let text = disk.contents(&Path::new(DATA).join("builds/b/verdict.json"))?;
    Some(serde_json::from_slice(&text).unwrap_or(Value::Null))
}

/// Reads every attempt and compares it with what its command wrote.
fn attempts(disk: &SimDisk, agents: &[Agent], history: &History) -> Result<BTreeMap<u32, Stored>, String> {
    let step = Path::new(DATA).join("builds/b/main");
    let mut found = BTreeMap::new();
    for attempt in 1.. {
        let dir = step.join(attempt.to_string());
        let Some(owner) = disk.contents(&dir.join("attempt.json")) else { break };
        let owner: Value = match serde_json::from_slice(&owner) {
            Err(_) if history.unsynced => break,
            owner => owner.map_err(|error| format!("attempt.json: {error}"))?,
        };
        let producer = owner["producer"].as_str().ok_or("attempt.json names nobody")?.to_owned();
        let agent = agents.iter().find(|agent| agent.producer().as_ref() == Some(&producer));
        let agent = match agent {
            None if history.unsynced => continue, // its owner's name was lost
            agent => agent.ok_or_else(|| format!("attempt {attempt} is nobody's"))?,
        };
        let stored = read_attempt(disk, &dir, producer, &agent.source.borrow())
            .map_err(|wrong| format!("attempt {attempt} of agent {}: {wrong}", agent.life))?;
        found.insert(attempt, stored);
    }
    Ok(found)
}

fn read_attempt(disk: &SimDisk, dir: &Path, producer: String, source: &Source) -> Result<Stored, String> {
    let file = |name| disk.contents(&dir.join(name)).unwrap_or_default();
    let (index, log, events) = (file("index"), file("log"), file("events"));
    let finished = disk.contents(&dir.join("finished.json"));
    let finished = finished.and_then(|text| serde_json::from_slice(&text).ok());
    let mut stored = Stored { producer, finished, ..Stored::default() };
    let mut adrift = [false; 2];
    for entry in index.chunks_exact(ENTRY) {
        let u64_at = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        if crc32c(&entry[..44]) != u32_at(44) {
            break; // a torn tail; the server cuts it when it opens the file
        }
        let (seq, offset, position, len) = (u64_at(0), u64_at(16), u64_at(24) as usize, u32_at(32) as usize);
        if entry[40] == 255 {
            saw("hole");
            stored.holes += offset - seq;
            stored.next = offset;
            adrift = [true; 2];
            continue;
        }
        let stream = Stream::from_number(entry[40]).ok_or("an unknown stream")?;
        let payload = if stream.is_output() { &log } else { &events };
        let Some(payload) = payload.get(position..position + len) else { break };
        if checksum(seq, stream, offset, payload) != u32_at(36) {
            break;
        }
        if seq != stored.next {
            return Err(format!("record {seq} where {} belongs", stored.next));
        }
        stored.next += 1;
        if !stream.is_output() {
            stored.note_event(payload);
            continue;
        }
        let at = usize::from(stream.number());
        if offset != stored.offsets[at] && !(adrift[at] && offset > stored.offsets[at]) {
            return Err(format!("record {seq} starts at {offset} of {stream:?}, not at {}", stored.offsets[at]));
        }
        adrift[at] = false;
        let end = offset as usize + len;
        let is_right = source.written[at].get(offset as usize..end) == Some(payload);
        stored.wrong += u64::from(!is_right);
        if !is_right && source.damaged != Some(seq) {
            return Err(format!("record {seq} is not what was written at {offset} of {stream:?}"));
        }
        stored.offsets[at] = end as u64;
    }
    Ok(stored)
}

impl Stored {
    fn note_event(&mut self, payload: &[u8]) {
        let event: Value = serde_json::from_slice(payload).unwrap_or_default();
        if event["event"] == "took-over" {
            saw("spool taken over");
        }
        if event["event"] == "gap" {
            saw("gap");
            let at = usize::from(event["stream"] == "stderr");
            let bytes = event["bytes"].as_u64().unwrap_or_default();
            self.gaps[at] += bytes;
            self.offsets[at] += bytes;
        }
    }
}

/// Castagnoli's CRC, bit by bit: not the programs' own.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc: u32, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}
