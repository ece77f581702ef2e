//! `--pty` and `--merge`.

use crate::support::{UNREACHABLE, agent, bounded, stderr, stdout};

#[test]
fn the_command_is_on_a_terminal_of_its_own_with_or_without_a_server() {
    let script = "test -t 1 && test -t 2 && ! test -t 0 && tty </dev/tty >/dev/null && stty size </dev/tty; \
                  printf 'no newline'; exit 3";
    for options in [&[][..], UNREACHABLE, &["--tee", "off"]] {
        let output = bounded(&[options, &["--pty", "--linger", "0s", "--", "sh", "-c", script]].concat());
        assert_eq!((output.status.code(), &*stdout(&output)), (Some(3), "24 80\nno newline"), "{}", stderr(&output));
    }
}

#[test]
fn the_size_of_the_terminal_comes_from_a_variable() {
    let output =
        agent(&["--pty", "--", "sh", "-c", "stty size </dev/tty"]).env("PHONEHOME_PTY_SIZE", "132x50").output();
    assert_eq!(stdout(&output.unwrap()), "50 132\n");
    for (wrong, expected) in [(&["--pty", "--pty-size", "132"][..], "120x40"), (&["--pty-size", "1x1"], "needs --pty")]
    {
        let output = bounded(&[wrong, &["--", "true"]].concat());
        assert_eq!(output.status.code(), Some(125));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
}

#[test]
fn every_byte_that_was_written_to_the_terminal_arrives() {
    let script = "seq 100000; printf end";
    let output = bounded(&[UNREACHABLE, &["--pty", "--linger", "0s", "--", "sh", "-c", script]].concat());
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).chain(["end".to_owned()]).collect();
    assert!(stdout(&output) == expected, "{} bytes, not {}", output.stdout.len(), expected.len());
}

#[test]
fn merged_streams_keep_their_order() {
    let script = "for i in 1 2 3 4 5 6 7 8 9; do echo out $i; echo err $i >&2; done";
    for options in [&[][..], UNREACHABLE] {
        let output = bounded(
            &[options, &["--merge", "--linger", "0s", "--log-level", "error", "--", "sh", "-c", script]].concat(),
        );
        let expected: String = (1..=9).map(|n| format!("out {n}\nerr {n}\n")).collect();
        assert_eq!((stdout(&output), stderr(&output)), (expected, String::new()));
    }
}

#[test]
fn a_command_that_turns_away_from_the_terminal_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("log");
    let script = format!("exec >{0} 2>&1; sleep 0.3; echo built; tty </dev/tty", file.display());
    for options in [&[][..], UNREACHABLE] {
        let output = bounded(&[options, &["--pty", "--linger", "0s", "--", "sh", "-c", &script]].concat());
        assert_eq!((output.status.code(), &*stdout(&output)), (Some(0), ""), "{}", stderr(&output));
        assert!(std::fs::read_to_string(&file).unwrap().starts_with("built\n/dev/"));
    }
}
