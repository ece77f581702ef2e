use http_body_util::BodyExt;
use phonehome_proto::frame::Stream;
use proptest::prelude::*;
use serde_json::Value;
use tokio::time::timeout;

use super::*;
use crate::{
    builds::{Order, Streams},
    http::log::lines::Decoration,
    scene::{Agent, Scene},
};

/// Longer than anything here takes, on a clock that stands still while there is work.
const LIMIT: Duration = Duration::from_secs(600);

impl Scene {
    fn seat(&self, readers: &Readers) -> Seat {
        let place = readers.place().expect("there is a place");
        Seat { env: self.env.clone(), readers: readers.clone(), _place: place, shutdown: self.shutdown.clone() }
    }

    /// A reader of everything, from a place on, to the verdict.
    fn follow(&self, form: Form, streams: Streams, from: Cursor) -> Body {
        let view = View { order: Order::Time, streams, from, until: None };
        let wanted = Wanted { build: self.build.clone(), view, starts: BTreeMap::new(), form, follow: true };
        body(wanted, self.seat(&Readers::default()))
    }

    fn follow_text(&self) -> Body {
        self.follow(Form::Text(Lines::new(Decoration::NONE)), Streams::Output, self.build.start())
    }
}

/// Everything a body says; `None` when it breaks off.
async fn all(body: Body) -> Option<Vec<u8>> {
    timeout(LIMIT, body.collect()).await.expect("it ends").ok().map(|all| all.to_bytes().to_vec())
}

/// The next piece of a body.
async fn piece(body: &mut Body) -> String {
    let frame = timeout(LIMIT, body.frame()).await.expect("it comes").expect("it goes on").unwrap();
    String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap().block_on(test);
}

/// Writes what comes next of a text, cut into records.
async fn write(scene: &Scene, agent: &mut Agent, written: &mut Vec<u8>, len: usize) {
    let bytes: Vec<u8> = (0..len).map(|at| b'a' + ((written.len() + at) % 26) as u8).collect();
    scene.write(agent, &[(written.len() as u64, Stream::Stdout, &bytes)]).await;
    written.extend_from_slice(&bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// History and what comes are one: no hole and no repeat where they join, whenever somebody comes.
    #[test]
    fn whoever_joins_at_any_moment_gets_everything_once(lens in prop::collection::vec(0..3000_usize, 1..12)) {
        run(async {
            let scene = Scene::new(&["main"]);
            let (mut agent, mut written) = (scene.agent(1, "main").await, Vec::new());
            let mut readers = vec![tokio::spawn(all(scene.follow_text()))];
            for len in lens {
                write(&scene, &mut agent, &mut written, len).await;
                readers.push(tokio::spawn(all(scene.follow_text())));
                tokio::task::yield_now().await;
            }
            scene.finish(&mut agent).await;
            readers.push(tokio::spawn(all(scene.follow_text())));
            for reader in readers {
                assert_eq!(reader.await.unwrap().as_ref(), Some(&written));
            }
        });
    }

    /// Cut off at any event, and back with its id.
    #[test]
    fn a_reader_of_events_that_comes_back_is_told_each_once(cuts in prop::collection::vec(0..6_usize, 0..12)) {
        run(async {
            let scene = Scene::new(&["a", "b"]);
            let (mut a, mut b) = (scene.agent(1, "a").await, scene.agent(2, "b").await);
            let (mut from, mut told) = (scene.build.start(), Vec::new());
            for (at, cut) in cuts.iter().enumerate() {
                let text = format!("{at}");
                let (agent, other) = if at % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
                scene.write(agent, &[(at as u64, Stream::Stdout, text.as_bytes())]).await;
                scene.write(other, &[(at as u64, Stream::Stderr, text.as_bytes())]).await;
                let mut body = scene.follow(Form::Sse, Streams::All, from.clone());
                let events = piece(&mut body).await;
                for event in events.split_terminator("\n\n").take(*cut) {
                    from = note(event, &scene, &mut told);
                }
            }
            scene.finish(&mut a).await;
            scene.finish(&mut b).await;
            let rest = all(scene.follow(Form::Sse, Streams::All, from.clone())).await.unwrap();
            for event in String::from_utf8(rest).unwrap().split_terminator("\n\n") {
                from = note(event, &scene, &mut told);
            }
            assert!(from.ended, "the end is the last event");
            let expected: Vec<_> = (0..cuts.len()).flat_map(|at| [at.to_string(), at.to_string()]).collect();
            told.sort_by_key(|text: &String| text.parse::<usize>().unwrap());
            assert_eq!(told, expected);
        });
    }
}

/// Notes the text of an event, and returns its id.
fn note(event: &str, scene: &Scene, told: &mut Vec<String>) -> Cursor {
    let field = |name| event.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let data: Value = serde_json::from_str(field("data: ")).unwrap();
    told.extend(data["text"].as_str().map(str::to_owned));
    scene.build.cursor(field("id: ")).unwrap()
}

/// Those who take nothing keep neither the writer nor the others from anything.
#[test]
fn readers_that_stall_hold_up_nobody() {
    run(async {
        let scene = Scene::new(&["main"]);
        let (mut agent, mut written) = (scene.agent(1, "main").await, Vec::new());
        let mut stalled: Vec<_> = (0..10).map(|_| scene.follow_text()).collect();
        let readers: Vec<_> = (0..40).map(|_| tokio::spawn(all(scene.follow_text()))).collect();
        for _ in 0..64 {
            write(&scene, &mut agent, &mut written, 60_000).await;
        }
        piece(&mut stalled[0]).await;
        scene.finish(&mut agent).await;
        for reader in readers {
            assert!(reader.await.unwrap().as_ref() == Some(&written));
        }
        assert!(all(stalled.remove(5)).await.as_ref() == Some(&written), "one that wakes up gets all of it");
    });
}

#[test]
fn a_line_is_told_at_once_and_silence_is_broken_by_comments() {
    run(async {
        let scene = Scene::new(&["main"]);
        let mut agent = scene.agent(1, "main").await;
        let mut body = scene.follow(Form::Sse, Streams::All, scene.build.start());
        let begun = Instant::now();
        assert_eq!((piece(&mut body).await.as_str(), begun.elapsed().as_secs()), (":\n\n", 15));
        scene.write(&mut agent, &[(1, Stream::Stdout, b"line\n")]).await;
        let begun = Instant::now();
        assert!(piece(&mut body).await.contains("line") && begun.elapsed() <= pace(1), "{:?}", begun.elapsed());
        assert_eq!((piece(&mut body).await.as_str(), begun.elapsed().as_secs()), (":\n\n", 15));
    });
}

#[test]
fn a_server_that_shuts_down_breaks_its_bodies_off() {
    run(async {
        let scene = Scene::new(&["main"]);
        let mut agent = scene.agent(1, "main").await;
        scene.write(&mut agent, &[(1, Stream::Stdout, b"line\n")]).await;
        let mut body = scene.follow_text();
        assert_eq!(piece(&mut body).await, "line\n");
        let reading = tokio::spawn(all(body));
        scene.shutdown.cancel();
        assert_eq!(reading.await.unwrap(), None);
    });
}

#[test]
fn a_log_that_is_not_followed_ends_at_what_is_stored() {
    run(async {
        let scene = Scene::new(&["main"]);
        let mut agent = scene.agent(1, "main").await;
        scene.write(&mut agent, &[(1, Stream::Stdout, b"one\ntwo\n"), (2, Stream::Stdout, b"three\n")]).await;
        let from = scene.build.start();
        let view = View { order: Order::Time, streams: Streams::All, from, until: None };
        let key = ("main".parse().unwrap(), 1);
        for (skip, expected) in
            [(0, vec!["one\ntwo\n", "three\n"]), (4, vec!["two\n", "three\n"]), (8, vec!["three\n"])]
        {
            let starts = BTreeMap::from([(key.clone(), Spot { seq: 0, skip })]);
            let (build, view) = (scene.build.clone(), view.clone());
            let wanted = Wanted { build, view, starts, form: Form::Ndjson, follow: false };
            let text = all(body(wanted, scene.seat(&Readers::default()))).await.unwrap();
            let lines = String::from_utf8(text).unwrap();
            let told = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["text"].clone());
            assert_eq!(told.collect::<Vec<_>>(), expected, "from byte {skip}");
        }
        scene.end().await;
    });
}

#[test]
fn reports_are_told_among_the_rest_and_once() {
    run(async {
        let scene = Scene::new(&["main"]);
        let mut agent = scene.agent(1, "main").await;
        let report = |time, reason: &str| Report {
            time,
            r#type: "Normal".into(),
            reason: reason.into(),
            message: String::new(),
            object: None,
            namespace: None,
            node: None,
            source: None,
            count: 1,
            first: None,
            last: None,
        };
        scene.build.note_reports([report(1, "early"), report(9, "late")]);
        scene.write(&mut agent, &[(5, Stream::Stdout, b"between\n")]).await;
        let mut body = scene.follow(Form::Sse, Streams::All, scene.build.start());
        let told = piece(&mut body).await;
        let at = |text| told.find(text).unwrap_or_else(|| panic!("{text}: {told}"));
        assert!(at("early") < at("between") && at("between") < at("late"));
        let last = told.split_terminator("\n\n").last().unwrap();
        let from = note(last, &scene, &mut Vec::new());
        scene.finish(&mut agent).await;
        let rest = String::from_utf8(all(scene.follow(Form::Sse, Streams::All, from)).await.unwrap()).unwrap();
        assert!(rest.starts_with("id: ") && rest.contains("event: end") && !rest.contains("event: report"), "{rest}");
    });
}
