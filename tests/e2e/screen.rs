//! What a build may do to the terminal of the person who watches: colour, and nothing else.

use crate::harness::{Hook, Scene, builder};

/// Everything that could move a cursor, clear a screen, set a title, ring, hide or forge.
const HOSTILE: &str = r#"printf 'start \033[31mred\033[0m end\n'
    printf '\033[2J\033[1;1Hcleared\n'
    printf '\033]0;title\007 \033]8;;http://evil\033\\link\033]8;;\033\\ \033Pdcs\033\\ \033_apc\033\\ strings\n'
    printf 'nul\000 bell\007 back\010\010 vt\013 ff\014 del\177 controls\n'
    printf '\302\233 2J \302\235 c1\n'
    printf '\033c\033(0\0337 short\n'
    printf '\342\200\256 bidi\n'
    printf '10%%\r20%%\r100%%\n'
    printf 'remote: \rforged\n'
    printf '\033[8mhidden\n'
    printf '\033['"#;

#[tokio::test]
async fn the_safe_form_lets_colour_through_and_nothing_else() {
    let scene = Scene::new();
    let launcher = builder(&scene, &[], &format!("{HOSTILE}; exec >&2; {HOSTILE}"));
    let ended = Hook::launch_in(scene, &["--render", "safe", "--color", "always"], &launcher).ended().await;
    assert_eq!(ended.code, 0);
    for printed in [&ended.stdout, &ended.stderr] {
        assert_harmless(printed);
        let text = String::from_utf8(printed.clone()).unwrap();
        assert!(text.contains("\x1b[31mred\x1b[0m"), "{text:?}");
        for word in ["cleared", "strings", "controls", "c1", "short", "bidi", "100%", "forged", "hidden"] {
            assert!(text.contains(word), "{word} in {text:?}");
        }
        assert!(text.ends_with('\n'), "{text:?}");
    }
}

#[tokio::test]
async fn colour_can_be_left_out_too() {
    let scene = Scene::new();
    let launcher = builder(&scene, &[], HOSTILE);
    let ended = Hook::launch_in(scene, &["--render", "safe", "--color", "never"], &launcher).ended().await;
    assert!(!ended.stdout.contains(&0x1b), "{}", ended.stdout());
    assert!(ended.stdout().contains("start red end\n"), "{}", ended.stdout());
}

#[tokio::test]
async fn the_raw_form_changes_nothing_even_then() {
    let scene = Scene::new();
    let launcher = builder(&scene, &[], HOSTILE);
    let mut hook = Hook::launch_in(scene, &["--render", "raw"], &launcher);
    let ended = hook.ended().await;
    let expected = std::process::Command::new("sh").args(["-c", HOSTILE]).output().unwrap().stdout;
    assert_eq!(ended.stdout, expected);
}

/// Checks that text, line breaks, tabs and colours are all there is.
pub(crate) fn assert_harmless(printed: &[u8]) {
    let text = std::str::from_utf8(printed).expect("what is safe is UTF-8");
    let mut rest = text;
    while let Some(at) = rest.find(is_suspicious) {
        let (_, found) = rest.split_at(at);
        rest = after_color(found).unwrap_or_else(|| panic!("{:?} in {text:?}", found.chars().next()));
    }
}

fn is_suspicious(c: char) -> bool {
    c.is_control() && !matches!(c, '\n' | '\r' | '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// What follows the colour that `text` starts with.
fn after_color(text: &str) -> Option<&str> {
    let parameters = text.strip_prefix("\x1b[")?;
    let (parameters, rest) = parameters.split_once('m')?;
    parameters.chars().all(|c| c.is_ascii_digit() || c == ';' || c == ':').then_some(rest)
}
