//! The masker against its definition, and the forms against real encoders.

use base64::{Engine, engine::general_purpose};
use phonehome_proto::frame::Stream;
use proptest::prelude::*;

use super::*;

/// The definition: what belongs to an occurrence of any pattern.
fn secret_bytes(patterns: &[Vec<u8>], text: &[u8]) -> Vec<bool> {
    let mut secret = vec![false; text.len()];
    for pattern in patterns {
        for (at, window) in text.windows(pattern.len()).enumerate() {
            if window == pattern {
                secret[at..at + pattern.len()].fill(true);
            }
        }
    }
    secret
}

/// The definition: each run of such bytes becomes one marker.
fn rendered(text: &[u8], secret: &[bool]) -> Vec<u8> {
    let mut output = Vec::new();
    for (at, byte) in text.iter().enumerate() {
        match (secret[at], at > 0 && secret[at - 1]) {
            (true, false) => output.extend_from_slice(MARKER.as_bytes()),
            (true, true) => {}
            (false, _) => output.push(*byte),
        }
    }
    output
}

/// How much of `text` may be written though more follows: all but the longest end that begins a pattern, and of that
/// what is known to be secret at its beginning.
fn decided(patterns: &[Vec<u8>], text: &[u8], secret: &[bool]) -> usize {
    let begins = |end: &[u8]| patterns.iter().any(|pattern| end.len() < pattern.len() && pattern.starts_with(end));
    let undecided = (0..=text.len()).find(|at| begins(&text[*at..])).unwrap();
    let touches = undecided == 0 || secret[undecided - 1];
    let is_secret = touches || secret.get(undecided).copied().unwrap_or(false);
    let more = secret[undecided..].iter().take_while(|secret| **secret && is_secret).count();
    undecided + more
}

fn masked(masker: &mut Masker, blocks: &[&[u8]]) -> Vec<u8> {
    let mut output = Vec::new();
    let now = Instant::now();
    blocks.iter().for_each(|block| masker.mask(block, now, &mut |piece| output.extend_from_slice(piece)));
    output
}

fn finished(masker: &mut Masker) -> Vec<u8> {
    let mut output = Vec::new();
    masker.finish(&mut |piece| output.extend_from_slice(piece));
    output
}

fn of_patterns(patterns: &[Vec<u8>]) -> Redactor {
    let mut patterns: Vec<&[u8]> = patterns.iter().map(Vec::as_slice).collect();
    patterns.sort_unstable();
    patterns.dedup();
    Redactor::of_patterns(patterns.len(), &patterns)
}

fn split<'text>(text: &'text [u8], ends: &mut dyn FnMut(usize) -> bool) -> Vec<&'text [u8]> {
    let mut from = 0;
    let mut blocks = Vec::new();
    for at in 1..text.len() {
        if ends(at) {
            blocks.push(&text[from..at]);
            from = at;
        }
    }
    blocks.push(&text[from..]);
    blocks
}

fn word(letters: &'static [u8], len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(letters), len)
}

/// Patterns, a text made of their parts and noise, and where it is split.
fn long_texts() -> impl Strategy<Value = (Vec<Vec<u8>>, Vec<u8>, Vec<bool>)> {
    let patterns = prop::collection::vec(word(b"abc", 8..40), 1..6);
    patterns.prop_flat_map(|mut patterns| {
        patterns.push(patterns[0][1..patterns[0].len() - 1].to_vec()); // within another
        let part = (0..patterns.len(), any::<prop::sample::Index>(), any::<prop::sample::Index>()).prop_map({
            let patterns = patterns.clone();
            move |(which, a, b)| {
                let pattern = &patterns[which];
                let (a, b) = (a.index(pattern.len() + 1), b.index(pattern.len() + 1));
                pattern[a.min(b)..a.max(b)].to_vec()
            }
        });
        let whole = prop::sample::select(patterns.clone());
        let pieces = prop::collection::vec(prop_oneof![part, whole, word(b"abcx", 0..9)], 0..20);
        pieces.prop_flat_map(move |pieces| {
            let text = pieces.concat();
            let ends = prop::collection::vec(prop::bool::weighted(0.2), text.len() + 1);
            (Just(patterns.clone()), Just(text), ends)
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_split_of_a_short_text_gives_what_the_definition_says(
        patterns in prop::collection::vec(word(b"ab", 3..7), 1..5),
        text in word(b"ab", 1..11),
    ) {
        let redactor = of_patterns(&patterns);
        let secret = secret_bytes(&patterns, &text);
        let expected = rendered(&text, &secret);
        for splits in 0..1u32 << (text.len() - 1) {
            let mut masker = Masker::new(&redactor);
            let mut output = masked(&mut masker, &split(&text, &mut |at| splits >> (at - 1) & 1 == 1));
            output.extend(finished(&mut masker));
            prop_assert_eq!(&output, &expected, "{:b}", splits);
        }
    }

    #[test]
    fn a_random_split_of_a_long_text_gives_what_the_definition_says((patterns, text, ends) in long_texts()) {
        let secret = secret_bytes(&patterns, &text);
        let mut masker = Masker::new(&of_patterns(&patterns));
        let mut output = masked(&mut masker, &split(&text, &mut |at| ends[at]));
        output.extend(finished(&mut masker));
        prop_assert_eq!(&output, &rendered(&text, &secret));
        let runs = secret.iter().enumerate().filter(|(at, is)| **is && (*at == 0 || !secret[at - 1])).count();
        prop_assert_eq!(masker.replaced(), runs as u64);
    }

    #[test]
    fn nothing_is_held_back_but_what_may_begin_a_secret((patterns, text, ends) in long_texts()) {
        let mut masker = Masker::new(&of_patterns(&patterns));
        let (mut output, mut read) = (Vec::new(), 0);
        for block in split(&text, &mut |at| ends[at]) {
            output.extend(masked(&mut masker, &[block]));
            read += block.len();
            let secret = secret_bytes(&patterns, &text[..read]);
            let decided = decided(&patterns, &text[..read], &secret);
            prop_assert_eq!(&output, &rendered(&text[..decided], &secret[..decided]));
            prop_assert_eq!(masker.deadline().is_some(), decided < read);
        }
    }

    #[test]
    fn every_form_of_any_value_can_be_made_and_found(value in prop::collection::vec(any::<u8>(), 6..80)) {
        let redactor = redactor(&[&value]);
        for form in forms::of(&value) {
            prop_assert_eq!(whole(&redactor, &form), MARKER.as_bytes());
        }
    }

    #[test]
    fn a_value_in_base64_leaves_at_most_the_characters_it_shares(
        value in prop::collection::vec(any::<u8>(), 6..80),
        before in prop::collection::vec(any::<u8>(), 0..6),
        after in prop::collection::vec(any::<u8>(), 0..6),
    ) {
        let text = [before.as_slice(), &value, &after].concat();
        for engine in [general_purpose::STANDARD, general_purpose::URL_SAFE_NO_PAD] {
            let encoded = engine.encode(&text);
            let (start, end) = ((before.len() * 8).div_ceil(6), (before.len() + value.len()) * 8 / 6);
            let end = if after.is_empty() { encoded.len() } else { end };
            let masked = redactor(&[&value]).mask_text(&encoded).into_owned();
            let (left, right) = masked.split_once(MARKER).unwrap();
            let (shared_left, shared_right) = (encoded.get(..start).unwrap(), encoded.get(end..).unwrap());
            prop_assert!(shared_left.starts_with(left) && shared_right.ends_with(right), "{encoded}: {masked}");
        }
    }

    #[test]
    fn a_text_in_json_is_found(value in "\\PC{6,30}|[\\x00-\\x7f]{6,30}") {
        prop_assume!(value.len() >= MIN_VALUE);
        let quoted = serde_json::to_string(&value).unwrap();
        prop_assert_eq!(redactor(&[value.as_bytes()]).mask_text(&quoted), format!("\"{MARKER}\""));
    }
}

#[test]
fn a_secret_is_masked_in_every_usual_form() {
    let value = "p/ä \"x\\y\"+~&1";
    let redactor = redactor(&[value.as_bytes()]);
    for form in [
        value,
        "p%2F%C3%A4%20%22x%5Cy%22%2B~%261",
        "p%2f%c3%a4%20%22x%5cy%22%2b~%261",
        "p%2F%C3%A4+%22x%5Cy%22%2B~%261",
        "p/%C3%A4%20%22x%5Cy%22%2B~%261",
        "p%2F%C3%A4+%22x%5Cy%22%2B%7E%261",
        r#"p/ä \"x\\y\"+~&1"#,
        r#"p\/\u00e4 \"x\\y\"+~&1"#,
        r#"p/\u00E4 \"x\\y\"+~&1"#,
        r#"p/ä \"x\\y\"+~\u00261"#,
        r#"p/\u00E4 \u0022x\\y\u0022\u002B~\u00261"#,
    ] {
        assert_eq!(redactor.mask_text(&format!("<{form}>")), format!("<{MARKER}>"), "{form}");
    }
    assert_eq!(redactor.mask_text("nothing of it"), Cow::Borrowed("nothing of it"));
}

#[test]
fn a_letter_beyond_16_bits_is_two_in_json() {
    let redactor = redactor(&["key 🔑 key".as_bytes()]);
    assert_eq!(redactor.mask_text(r"key \ud83d\udd11 key"), MARKER);
    assert_eq!(redactor.mask_text(r"key \uD83D\uDD11 key"), MARKER);
}

#[test]
fn a_value_of_several_lines_is_masked_whole_and_line_by_line() {
    let frame = "-----BEGIN KEY-----";
    let lines = [frame, "MIIEvQIBADANBg", "kqhkiG9w0BAQEF", "AA=="];
    for redactor in [redactor(&[lines.join("\n").as_bytes()]), redactor(&[lines.join("\r\n").as_bytes()])] {
        for end in ["\n", "\r\n", "", r"\n"] {
            if end == r"\n" && redactor.mask_text(&lines.join(r"\r\n")) == MARKER {
                continue; // a value with CRLF is escaped as it is
            }
            assert_eq!(redactor.mask_text(&lines.join(end)), MARKER, "{end:?}");
        }
        assert_eq!(redactor.mask_text("x MIIEvQIBADANBg y"), format!("x {MARKER} y"));
        assert_eq!(redactor.mask_text("    kqhkiG9w0BAQEF\n"), format!("    {MARKER}\n"));
        assert_eq!(redactor.mask_text(frame), frame, "the frame of a PEM file is no secret");
        assert_eq!(redactor.mask_text("AA=="), "AA==", "nor is a short line");
    }
}

#[test]
fn base64_that_is_broken_into_lines_is_masked() {
    let value: Vec<u8> = (0..200).collect();
    let redactor = redactor(&[&value]);
    for (width, after) in [(76, ""), (64, ""), (76, "\n"), (64, "more")] {
        let text = general_purpose::STANDARD.encode([&value, after.as_bytes()].concat());
        let lines: Vec<_> = text.as_bytes().chunks(width).map(|line| str::from_utf8(line).unwrap()).collect();
        let masked = redactor.mask_text(&lines.join("\n")).into_owned();
        assert!(masked.starts_with(MARKER) && masked.len() < MARKER.len() + 12, "{masked}");
    }
}

#[test]
fn overlapping_secrets_are_masked_together() {
    let redactor = redactor(&[b"abcdef", b"defghi"]);
    assert_eq!(redactor.mask_text("-abcdefghi-abcdefabcdef-"), format!("-{MARKER}-{MARKER}-"));
}

#[tokio::test(start_paused = true)]
async fn what_may_begin_a_secret_is_written_once_nothing_follows_it() {
    let mut masker = Masker::new(&redactor(&[b"password1"]));
    let mut output = Vec::new();
    let mut write = |piece: &[u8]| output.extend_from_slice(piece);
    let start = Instant::now();
    masker.mask(b"your pass", start, &mut write);
    masker.mask(b"word", start + IDLE / 2, &mut write);
    assert_eq!(masker.deadline(), Some(start + IDLE / 2 + IDLE));
    masker.poll(start + IDLE, false, &mut write);
    masker.poll(start + IDLE / 2 + IDLE, true, &mut write);
    assert_eq!(masker.deadline(), Some(start + IDLE / 2 + 2 * IDLE), "more has come already");
    masker.poll(start + IDLE / 2 + 2 * IDLE, false, &mut write);
    assert_eq!(masker.deadline(), None);
    masker.mask(b"1 ", start + 3 * IDLE, &mut write);
    assert_eq!((masker.replaced(), &*output), (0, &b"your password1 "[..]));
}

#[test]
fn what_is_secret_in_any_case_is_not_held_back() {
    let mut masker = Masker::new(&of_patterns(&[b"secret".to_vec(), b"secret and more".to_vec()]));
    assert_eq!(masked(&mut masker, &[b"a secret"]), b"a [redacted]");
    assert_eq!(masked(&mut masker, &[b" and"]), b"");
    assert_eq!(masked(&mut masker, &[b" more"]), b"");
    assert_eq!(masked(&mut masker, &[b"!"]), b"!");
    assert_eq!(masker.replaced(), 1);
}

#[test]
fn short_values_are_left_out_and_equal_ones_count_once() {
    assert!(Redactor::new([Zeroizing::new(b"short".to_vec())]).unwrap().is_none());
    assert!(Redactor::new([]).unwrap().is_none());
    assert_eq!(redactor(&[b"secret", b"secret", b"short", b"other one"]).values(), 2);
}

#[test]
fn the_largest_value_fits_and_many_of_them_do_not() {
    let block = |at: u32| *blake3::hash(&at.to_le_bytes()).as_bytes();
    let value = |seed| Zeroizing::new((0..MAX_VALUE as u32 / 32).flat_map(|at| block(at + seed)).collect::<Vec<_>>());
    assert!(Redactor::new([value(0)]).is_ok());
    assert_eq!(Redactor::new([0, 1 << 20].map(value)).unwrap_err(), TooLarge);
}

#[test]
fn secrets_are_not_shown() {
    let redactor = redactor(&[b"hunter22"]);
    let mut masker = Masker::new(&redactor);
    masked(&mut masker, &[b"hunter"]);
    assert!(!format!("{redactor:?} {masker:?}").contains("hunter"));
}

/// Prints what masking costs: `cargo test --release -p phonehome-agent masking_is_fast -- --ignored --nocapture`.
#[test]
#[ignore = "measures"]
#[expect(clippy::print_stdout, reason = "its result")]
fn masking_is_fast() {
    let token = |bytes: Vec<u8>| general_purpose::STANDARD_NO_PAD.encode(bytes).into_bytes();
    let values: Vec<Vec<u8>> =
        (0..5).map(|at| blake3::hash(&[at]).as_bytes()[..10 + 4 * usize::from(at)].to_vec()).map(token).collect();
    let line = "   Compiling some-crate v1.2.3 (/workspace/src/some-crate)\n[ 42%] Building CXX object lib/main.cc.o\n";
    let noise: String = (0..500u32).map(|at| format!("{}{line}", blake3::hash(&at.to_le_bytes()).to_hex())).collect();
    let key = token((0..40u32).flat_map(|at| *blake3::hash(&at.to_le_bytes()).as_bytes()).collect());
    let key = key.chunks(64).collect::<Vec<_>>().join(&b'\n');
    let with_key = [values.as_slice(), &[key]].concat();
    for (name, values) in [("tokens", values), ("tokens and a key", with_key), ("short", vec![b"secret".to_vec()])] {
        let redactor = redactor(&values.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let size: usize = values.iter().map(|value| forms::size(&forms::of(value))).sum();
        println!("{name}: {size} bytes of forms");
        for (kind, text) in [("build output", line.repeat(700)), ("with digests", noise.clone())] {
            let mut masker = Masker::new(&redactor);
            let mut output = Vec::with_capacity(2 * text.len());
            let (start, rounds) = (Instant::now(), 2000);
            for _ in 0..rounds {
                output.clear();
                masker.mask(text.as_bytes(), start, &mut |piece| output.extend_from_slice(piece));
            }
            let megabytes = (rounds * text.len()) as f64 / 1e6;
            println!("{name}, {kind}: {:.0} MB/s", megabytes / start.elapsed().as_secs_f64());
        }
    }
}

#[test]
fn an_event_stays_one_of_its_kind_whatever_the_secrets_are() {
    let redactor = redactor(&[b"123456", b"reason", b"stopping", b"two\nlines", b"hunter2", b"stdout"]);
    let stopping = |reason: &str| {
        let (reason, signal, grace_ms) = (reason.into(), "SIGTERM".into(), 1_234_567);
        Event::Stopping(phonehome_proto::event::Stopping { reason, signal, grace_ms })
    };
    let mut event = stopping("a reason: \"hunter2\" 1234567 two\nlines");
    redactor.mask_event(&mut event);
    assert_eq!(event, stopping("a [redacted]: \"[redacted]\" [redacted]7 [redacted]"));
    let gap =
        |cause: &str| Event::Gap(phonehome_proto::event::Gap { stream: Stream::Stdout, bytes: 1, cause: cause.into() });
    let mut event = gap("stdout");
    redactor.mask_event(&mut event);
    assert_eq!(Event::parse(&event.payload()), Some(gap("[redacted]")), "the name of a stream is no text");
}

fn redactor(values: &[&[u8]]) -> Redactor {
    Redactor::new(values.iter().map(|value| Zeroizing::new(value.to_vec()))).unwrap().unwrap()
}

fn whole(redactor: &Redactor, text: &[u8]) -> Vec<u8> {
    let mut masker = Masker::new(redactor);
    let mut output = masked(&mut masker, &[text]);
    output.extend(finished(&mut masker));
    output
}
