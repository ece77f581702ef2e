//! What an agent finds in the spool of an earlier one: files as it left them, cut, changed or filled by somebody else,
//! under any name. Whatever it is, little memory is taken, every record from the first to the last is there as its
//! checksum says, and looking does not change it.

#![no_main]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use phonehome_agent::fuzzing::{Left, write};
use phonehome_env::disk::Disk;
use phonehome_fuzz::{Input, disk::MemoryDisk, memory::Meter};
use phonehome_proto::{
    codec::binary::{HEADROOM, Sealed, decode_agent, seal},
    frame::{AgentFrame, End, Finished, Hello, Stream},
    id::{ProducerId, StepName},
    limits::MAX_PAYLOAD,
    tally::Tally,
};

#[global_allocator]
static MEMORY: Meter = Meter::new();

/// Most memory that taking up takes, bytes: one message is read ahead, and serde takes up to 1 MiB for a list whose length
/// it was told and whose elements it has not seen.
const BOUND: usize = 2 * 1024 * 1024;

const DIR: &str = "/spool/000001-07";
/// An agent's, with a small limit.
const SEGMENT: u64 = 4096;

fuzz_target!(|input: &[u8]| {
    let mut input = Input::new(input);
    let scene = Scene::write(&mut input);
    let mut changes = 0;
    while !input.is_empty() {
        scene.change(&mut input);
        changes += 1;
    }
    let (found, memory) = MEMORY.measure(|| scene.take_up());
    assert!(memory <= BOUND, "{memory} bytes to take up {} bytes", scene.size());
    let before = scene.disk.contents();
    let Some(mut left) = found else {
        assert!(changes > 0, "it was left and is not found"); // what somebody else put there is left alone
        return;
    };
    scene.check(&mut left, changes == 0);
    let range = left.range();
    let finished = left.finished().cloned();
    drop(left);
    let mut again = scene.take_up().expect("it was there before");
    assert_eq!((again.range(), again.finished()), (range, finished.as_ref()), "found again it is another");
    assert_eq!(scene.disk.contents(), before, "looking changes the files");
    scene.deliver(&mut again);
    again.remove().expect("nothing is wrong with this disk");
    assert!(scene.disk.contents().is_empty(), "not all is removed");
});

/// What an agent has left.
struct Scene {
    disk: MemoryDisk,
    next: u64,
    /// What was written.
    messages: Vec<Bytes>,
    finished: Option<Finished>,
}

impl Scene {
    /// Some records in segments, perhaps the end.
    fn write(input: &mut Input<'_>) -> Self {
        let (shape, count) = (input.byte(), input.below(12));
        let start = match shape & 3 {
            0 | 1 => 0,
            2 => u64::from(shape >> 2),
            _ => u64::MAX - u64::from(shape >> 2),
        };
        let mut tally = Tally::default();
        tally.skip_to(start);
        let mut pieces = Vec::new();
        for seq in (start..u64::MAX).take(count.into()) {
            let choice = input.byte();
            let stream = Stream::from_number(choice & 1).expect("there are three");
            let len = [0, 1, 5, 40, 300, 2000, 9000, MAX_PAYLOAD][usize::from(choice >> 1 & 7)];
            let sealed = sealed(seq, stream, tally.offset(stream), &vec![choice; len]);
            tally.add(&sealed.record);
            if pieces.is_empty() || choice & 16 == 0 {
                pieces.push(Vec::new());
            }
            pieces.last_mut().expect("there is one").push(sealed);
        }
        let (next, counts, digest) = (tally.next(), tally.counts(), tally.digest());
        let finished = Finished { next, counts, digest, end: End::Exited(0), time: 1, usage: None };
        let finished = (shape & 128 == 0).then_some(finished);
        let hello = Hello {
            build: "b".parse().expect("a name"),
            step: StepName::default(),
            producer: ProducerId([7; 16]),
            oldest: start,
            next: start,
            labels: BTreeMap::new(),
            agent: "agent".into(),
            capabilities: Vec::new(),
        };
        let disk = MemoryDisk::default();
        write(Arc::new(disk.clone()), Path::new(DIR), &hello, SEGMENT, &pieces, finished.as_ref())
            .expect("nothing is wrong with this disk");
        let messages = pieces.into_iter().flatten().map(|sealed| sealed.message).collect();
        Self { disk, next, messages, finished }
    }

    fn take_up(&self) -> Option<Left> {
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        Left::take_up(disk, Path::new(DIR), SEGMENT).ok().flatten()
    }

    fn size(&self) -> usize {
        self.disk.contents().values().map(Vec::len).sum()
    }

    /// One change to one of the files, or another file.
    fn change(&self, input: &mut Input<'_>) {
        let choice = input.byte();
        let path = self.pick(input);
        let mut bytes = self.disk.contents().remove(&path).unwrap_or_default();
        let len = bytes.len();
        let at = if len == 0 { 0 } else { usize::from(u16::from_le_bytes([input.byte(), input.byte()])) % len };
        match choice % 12 {
            0 => return self.disk.take(&path),
            1 | 2 if len > 0 => bytes[at] ^= input.byte().max(1),
            3 | 4 => bytes.truncate(at),
            5 => {
                let count = usize::from(input.byte());
                drop(bytes.splice(at..at, input.bytes(count).to_vec()));
            }
            6 => {
                let count = usize::from(input.byte());
                drop(bytes.drain(at..(at + count).min(len)));
            }
            7 => {
                self.disk.take(&path);
                return self.disk.put(&self.pick(input), bytes);
            }
            8 => bytes.extend_from_slice(&u32::MAX.to_le_bytes()),
            9 => {
                // A length, and less than that.
                bytes.extend_from_slice(&(input.near(256 * 1024) as u32).to_le_bytes());
                bytes.resize(bytes.len() + at, 0);
            }
            10 => {
                // Anything, as a message.
                let count = usize::from(input.byte());
                let message = input.bytes(count);
                bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
                bytes.extend_from_slice(message);
            }
            _ => {
                // A record that follows the last, or does not.
                let usual = number(&path).unwrap_or(0).wrapping_add(input.byte().into());
                let seq = input.near(usual);
                let stream = Stream::from_number(input.below(3)).expect("there are three");
                let message = sealed(seq, stream, input.near(0), &[choice]).message;
                bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
                bytes.extend_from_slice(&message);
            }
        }
        bytes.truncate(512 * 1024);
        self.disk.put(&path, bytes);
    }

    /// A file that is there, or may be.
    fn pick(&self, input: &mut Input<'_>) -> PathBuf {
        let name = match input.byte() {
            there @ 0..=127 => {
                let paths: Vec<_> = self.disk.contents().into_keys().collect();
                return paths
                    .get(usize::from(there) % paths.len().max(1))
                    .map_or(Path::new(DIR).join("hello"), Clone::clone);
            }
            128..=140 => "hello".to_owned(),
            141..=150 => "finished".to_owned(),
            151..=220 => format!("{:020}.records", input.near(self.next)),
            221..=235 => format!("{}.records", input.near(self.next)),
            _ => {
                let len = usize::from(input.below(24));
                let name = String::from_utf8_lossy(input.bytes(len)).replace(['/', '\0', '.'], "");
                if input.byte() & 1 == 0 { format!("{name}.records") } else { format!("x{name}") }
            }
        };
        Path::new(DIR).join(name)
    }

    /// Everything in it, as it is sent to a server.
    fn check(&self, left: &mut Left, is_whole: bool) {
        let (first, next) = left.range();
        assert!(first <= next);
        assert!(left.bytes() <= self.size() as u64);
        let mut messages = Vec::new();
        let mut at = first;
        while at < next {
            let (read, memory) = MEMORY.measure(|| left.read(at, 1024));
            assert!(memory <= BOUND, "{memory} bytes to read");
            let Ok(read) = read else {
                assert!(!is_whole, "record {at} is gone");
                let resumed = left.resumes_at(at);
                assert!(resumed > at, "it does not go on");
                at = resumed.min(next);
                continue;
            };
            assert!(!read.is_empty());
            for Sealed { record, message } in read {
                assert_eq!(record.seq, at, "a gap, or out of order");
                assert!(record.is_intact());
                let decoded = decode_agent(&message).expect("it was checked");
                assert_eq!(decoded, AgentFrame::Records(vec![record]));
                messages.push(message);
                at += 1;
            }
        }
        assert_eq!(at, next, "more than there is");
        if let Some(finished) = left.finished() {
            assert_eq!(finished.next, next, "the end promises other records");
        }
        if is_whole {
            assert_eq!((messages, left.finished()), (self.messages.clone(), self.finished.as_ref()));
        }
    }

    /// Reads backwards, and forgets what was read forwards.
    fn deliver(&self, left: &mut Left) {
        let (first, next) = left.range();
        for at in (first..next).rev().take(20) {
            assert!(left.read(at, 1).is_ok_and(|read| read[0].record.seq == at) || left.read(at, 1).is_err());
        }
        let middle = first + (next - first) / 2;
        left.forget(middle);
        if middle < next {
            assert!(left.read(middle, 1).map_or(true, |read| read[0].record.seq == middle));
        }
    }
}

fn sealed(seq: u64, stream: Stream, offset: u64, payload: &[u8]) -> Sealed {
    let mut buffer = BytesMut::zeroed(HEADROOM);
    buffer.extend_from_slice(payload);
    seal(buffer, seq, 3, stream, offset)
}

fn number(path: &Path) -> Option<u64> {
    path.file_stem()?.to_str()?.parse().ok()
}
