//! The labels of this attempt: put together from options, variables and the files of a pod, and kept up to date.
//!
//! The kubelet replaces the files of a Downward API volume when the pod's labels change, by a rename of the `..data`
//! link in the volume's directory. Whoever waits for labels gets them through a [`watch`] channel; a change also
//! becomes an event of the log.

mod downward;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use phonehome_env::Env;
use phonehome_proto::{
    event::{self, Event},
    limits::{MAX_HEAD, MAX_LABEL, MAX_LABELS, MAX_PAYLOAD},
};
use rustix::fs::OFlags;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tracing::warn;

use self::downward::Parsed;
use crate::{config::LabelsConfig, herald::Herald, watch::Watch};

/// Labels as they are at a moment.
pub(crate) type Labels = Arc<BTreeMap<String, String>>;

/// Keeps the labels up to date. Without files there is nothing to do: [`Self::open`] gives none.
#[derive(Debug)]
pub(crate) struct Labeller {
    env: Env,
    herald: Herald,
    config: LabelsConfig,
    /// Of labels and of annotations.
    files: [Source; 2],
    current: watch::Sender<Labels>,
    /// What was said to be left out.
    left_out: Vec<LeftOut>,
}

/// How long the files may take to be read before the first call home goes without them.
const FIRST_READ: Duration = Duration::from_secs(1);

/// Pause between a hint that something has changed and a look at it: changes come in bursts, and who writes to the
/// directory all the time must not keep the agent busy.
const SETTLE: Duration = Duration::from_millis(100);

/// Pause between looks without any hint, for file systems that give none.
const PERIOD: Duration = Duration::from_secs(30);

impl Labeller {
    /// The labels as they are now, and who has to run to keep them up to date.
    pub(crate) async fn open(
        env: &Env,
        config: LabelsConfig,
        herald: Herald,
    ) -> (watch::Receiver<Labels>, Option<Self>) {
        let files = [&config.labels_file, &config.annotations_file].map(|path| Source::new(path.clone()));
        let (current, labels) = watch::channel(Labels::default());
        let mut labeller = Self { env: env.clone(), herald, config, files, current, left_out: Vec::new() };
        if timeout(FIRST_READ, labeller.read()).await.is_err() {
            warn!("the files of labels take long to be read; the labels come later");
        }
        let first = labeller.put_together();
        labeller.current.send_replace(first);
        let has_files = labeller.files.iter().any(|file| file.path.is_some());
        (labels, has_files.then_some(labeller))
    }

    /// Ends only from outside.
    pub(crate) async fn run(mut self) {
        loop {
            let mut watches = Watches::new(&self.env, &self.files).await; // before the look, so that no change falls between the two
            self.look().await;
            while let Ok(Ok(())) = timeout(PERIOD, watches.changed()).await {
                sleep(SETTLE).await;
                self.look().await;
            }
            sleep(SETTLE).await;
        }
    }

    /// Reads the files and tells whoever has to know, if the labels are others than before.
    async fn look(&mut self) {
        self.read().await;
        let labels = self.put_together();
        if *self.current.borrow() != labels {
            self.herald.tell(Event::Labels(event::Labels { labels: (*labels).clone() }));
            self.current.send_replace(labels);
        }
    }

    async fn read(&mut self) {
        for file in &mut self.files {
            file.read(&self.env).await;
        }
    }

    fn put_together(&mut self) -> Labels {
        let [labels, annotations] = self.files.each_ref().map(|file| &file.parsed.labels);
        let (labels, left_out) = put_together(&self.config, labels, annotations);
        if left_out != self.left_out && !left_out.is_empty() {
            warn!("labels that do not fit are left out: {}", LeftOut::list(&left_out));
        }
        self.left_out = left_out;
        Arc::new(labels)
    }
}

/// Tells of changes in the directories of both files, as far as they can be watched.
struct Watches(Vec<Watch>);

impl Watches {
    async fn new(env: &Env, files: &[Source]) -> Self {
        let paths = files.iter().filter_map(|file| file.path.as_deref());
        let dirs: BTreeSet<_> = paths.map(|path| directory(path).to_owned()).collect();
        let watch = move || dirs.iter().filter_map(|dir| Watch::new(dir).ok()).collect();
        Self(env.blocking(watch).await) // what cannot be watched is looked at now and then
    }

    /// Completes with an error when the watches are worth no more.
    async fn changed(&mut self) -> io::Result<()> {
        match &mut self.0[..] {
            [] => std::future::pending().await,
            [one] => one.changed().await,
            [one, other, ..] => tokio::select! {
                changed = one.changed() => changed,
                changed = other.changed() => changed,
            },
        }
    }
}

fn directory(file: &Path) -> &Path {
    file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// One of the files, and what it said when it could be read last.
#[derive(Debug)]
struct Source {
    path: Option<PathBuf>,
    parsed: Parsed,
    /// Why it could not be read the last time.
    trouble: Option<String>,
}

/// Largest file, bytes. Kubernetes allows 256 KiB of annotations, and quoting may make four of one byte.
const MAX_FILE: u64 = 1024 * 1024;

impl Source {
    fn new(path: Option<PathBuf>) -> Self {
        Self { path, parsed: Parsed::default(), trouble: None }
    }

    async fn read(&mut self, env: &Env) {
        let Some(path) = self.path.clone() else { return };
        let read = env.blocking(move || read_file(&path)).await;
        match read {
            Ok(contents) => self.handle_contents(&contents),
            Err(trouble) => self.handle_trouble(trouble.to_string()),
        }
    }

    fn handle_contents(&mut self, contents: &[u8]) {
        self.trouble = None;
        let parsed = Parsed::read(contents);
        if parsed.bad != self.parsed.bad || parsed.bad_lines != self.parsed.bad_lines {
            for (line, why) in &parsed.bad {
                warn!("{} line {line} is left out: {why}", self.name());
            }
            let untold = parsed.bad_lines - parsed.bad.len();
            if untold > 0 {
                warn!("{}: {untold} more lines are left out", self.name());
            }
        }
        self.parsed = parsed;
    }

    /// What the file said before stays: it may just be replaced.
    fn handle_trouble(&mut self, trouble: String) {
        if self.trouble.as_ref() != Some(&trouble) {
            warn!("{} cannot be read, it is tried again: {trouble}", self.name());
            self.trouble = Some(trouble);
        }
    }

    fn name(&self) -> impl std::fmt::Display {
        self.path.as_deref().unwrap_or(Path::new("")).display()
    }
}

/// Does not wait for the writer of a pipe, and takes nothing but a file of bounded size.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut contents = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut contents)?;
    if contents.len() as u64 > MAX_FILE {
        return Err(io::Error::other(format!("it is larger than {MAX_FILE} bytes")));
    }
    Ok(contents)
}

/// A label for which there is no room.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LeftOut {
    key: String,
    why: &'static str,
}

/// Keys that a warning names; it counts the rest.
const MOST_NAMED: usize = 10;

impl LeftOut {
    fn list(all: &[Self]) -> String {
        let named: Vec<_> = all.iter().take(MOST_NAMED).map(Self::told).collect();
        match all.len() - named.len() {
            0 => named.join(", "),
            more => format!("{} and {more} more", named.join(", ")),
        }
    }

    /// Short: a key has no limit of its own in a file that anybody may have written.
    fn told(&self) -> String {
        let key: String = self.key.chars().take(100).collect();
        format!("{key:?} ({})", self.why)
    }
}

/// All labels together as JSON, bytes. One hello has to hold them, whose head has a limit, and one event, which is a
/// record; written as JSON they are never smaller than on the wire, so half of either is room enough for the rest.
const MAX_ALL: usize = MAX_HEAD / 2;
const _: () = assert!(MAX_ALL <= MAX_PAYLOAD / 2);

/// The prefix of what was an annotation.
const ANNOTATION: &str = "annotation.";

/// Merges all there is. Of equal keys options win over the labels file, that over annotations, those over variables.
/// Where there is no room for all, options and variables come first, then labels, then annotations, by their keys.
fn put_together(
    config: &LabelsConfig,
    labels: &BTreeMap<String, String>,
    annotations: &BTreeMap<String, String>,
) -> (BTreeMap<String, String>, Vec<LeftOut>) {
    let annotations: BTreeMap<_, _> =
        annotations.iter().map(|(key, value)| (format!("{ANNOTATION}{key}"), value.clone())).collect();
    let sources = [&config.explicit, labels, &annotations, &config.identity];
    let (mut room, mut seen, mut left_out) = (Room::default(), BTreeSet::new(), Vec::new());
    for key in [&config.explicit, &config.identity, labels, &annotations].into_iter().flat_map(BTreeMap::keys) {
        if !seen.insert(key) {
            continue;
        }
        let value = sources.iter().find_map(|source| source.get(key)).expect("each key is from one of them");
        if let Err(why) = room.take(key, value) {
            left_out.push(LeftOut { key: key.clone(), why });
        }
    }
    (room.taken, left_out)
}

/// What one hello can hold.
#[derive(Default)]
struct Room {
    taken: BTreeMap<String, String>,
    size: usize,
}

impl Room {
    fn take(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        if key.len() + value.len() > MAX_LABEL {
            return Err("it is too long");
        }
        if self.taken.len() == MAX_LABELS {
            return Err("there are too many");
        }
        let size = serde_json::to_vec(&(key, value)).map_or(usize::MAX, |json| json.len());
        if size > MAX_ALL - self.size {
            return Err("all together are too long");
        }
        self.size += size;
        self.taken.insert(key.to_owned(), value.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use phonehome_proto::{
        codec::Codec,
        frame::{AgentFrame, Hello},
        id::ProducerId,
    };
    use tokio::{sync::mpsc, task::JoinHandle};

    use super::*;
    use crate::herald::News;

    #[test]
    fn of_equal_keys_the_nearest_source_wins() {
        let config = LabelsConfig {
            explicit: map(&[("a", "option"), ("annotation.x", "option")]),
            identity: map(&[("a", "variable"), ("k8s.pod.name", "variable"), ("k8s.pod.ip", "variable")]),
            ..LabelsConfig::default()
        };
        let labels = map(&[("a", "label"), ("b", "label"), ("annotation.y", "label"), ("k8s.pod.name", "label")]);
        let annotations = map(&[("x", "annotation"), ("y", "annotation"), ("z", "annotation"), ("b", "annotation")]);
        let (merged, left_out) = put_together(&config, &labels, &annotations);
        let expected = [
            ("a", "option"),
            ("annotation.b", "annotation"),
            ("annotation.x", "option"),
            ("annotation.y", "label"),
            ("annotation.z", "annotation"),
            ("b", "label"),
            ("k8s.pod.ip", "variable"),
            ("k8s.pod.name", "label"),
        ];
        assert_eq!((merged, left_out), (map(&expected), vec![]));
    }

    #[test]
    fn what_does_not_fit_is_left_out_and_the_most_important_labels_are_not() {
        let numbered = |prefix: &str, count: usize| -> BTreeMap<_, _> {
            (0..count).map(|number| (format!("{prefix}{number:03}"), "v".to_owned())).collect()
        };
        let config = LabelsConfig {
            explicit: map(&[("zz", "option")]),
            identity: map(&[("k8s.pod.name", "pod")]),
            ..LabelsConfig::default()
        };
        let mut annotations = numbered("a", 100);
        annotations.insert("kubectl.kubernetes.io/last-applied-configuration".into(), "x".repeat(5000));
        let (merged, left_out) = put_together(&config, &numbered("label", 100), &annotations);
        assert_eq!(merged.len(), MAX_LABELS);
        assert!(["zz", "k8s.pod.name", "label099", "annotation.a025"].iter().all(|key| merged.contains_key(*key)));
        assert!(!merged.contains_key("annotation.a026"));
        assert_eq!(left_out.len(), 75);
        let told = LeftOut::list(&left_out);
        assert!(told.starts_with("\"annotation.a026\" (there are too many), "), "{told}");
        assert!(told.ends_with(" and 65 more"), "{told}");
        assert_eq!(left_out.last().unwrap().why, "it is too long");
    }

    #[test]
    fn whatever_the_labels_are_a_hello_and_an_event_hold_them() {
        for filler in ["v", "\"", "\0", "ß", "\u{1f600}"] {
            let long = filler.repeat((MAX_LABEL - 10) / filler.len());
            let short = filler.repeat(40);
            for value in [long, short] {
                let labels = (0..200).map(|number| (format!("{number:03}"), value.clone())).collect();
                let (labels, left_out) = put_together(&LabelsConfig::default(), &labels, &BTreeMap::new());
                assert!(!labels.is_empty() && !left_out.is_empty(), "{filler:?}");
                let event = Event::Labels(event::Labels { labels: labels.clone() });
                assert!(event.payload().len() <= MAX_PAYLOAD, "{filler:?}");
                let hello = hello(labels);
                assert!(hello.is_reasonable());
                for codec in [Codec::Binary, Codec::Json] {
                    codec.encode_agent(&AgentFrame::Hello(hello.clone())).unwrap();
                }
            }
        }
    }

    /// It would take minutes if each label were compared with all others.
    #[test]
    fn a_file_of_nothing_but_labels_takes_no_time() {
        let labels = (0..100_000).map(|number| (number.to_string(), String::new())).collect();
        let (merged, left_out) = put_together(&LabelsConfig::default(), &labels, &labels);
        assert_eq!((merged.len(), left_out.len()), (MAX_LABELS, 200_000 - MAX_LABELS));
    }

    #[tokio::test]
    async fn labels_follow_the_volume_of_a_pod_and_only_real_changes_are_events() {
        let volume = Volume::new();
        volume.project(&[("labels", "app=\"shop\"\nbad line\n"), ("annotations", "build=\"1\"")]);
        let mut running = Running::start(&volume).await;
        assert_eq!(running.current(), map(&[("annotation.build", "1"), ("app", "shop"), ("k8s.pod.name", "pod")]));

        volume.project(&[("labels", "app=\"shop\""), ("annotations", "build=\"1\"\n")]); // the same, said differently
        volume.project(&[("labels", "app=\"store\""), ("annotations", "build=\"1\"")]);
        let expected = map(&[("annotation.build", "1"), ("app", "store"), ("k8s.pod.name", "pod")]);
        assert_eq!(running.next_event().await, expected);
        assert_eq!(running.current(), expected);

        volume.project(&[("labels", "k8s.pod.name=\"other\""), ("annotations", "")]);
        assert_eq!(running.next_event().await, map(&[("k8s.pod.name", "other")]));
        assert!(running.news.try_recv().is_err());
    }

    #[tokio::test]
    async fn files_that_appear_late_are_taken_up_and_what_is_gone_stays() {
        let volume = Volume::new();
        let mut running = Running::start(&volume).await;
        assert_eq!(running.current(), map(&[("k8s.pod.name", "pod")]));
        volume.project(&[("labels", "app=\"shop\"")]);
        assert_eq!(running.next_event().await, map(&[("app", "shop"), ("k8s.pod.name", "pod")]));
        fs::remove_file(volume.path("labels")).unwrap();
        fs::write(volume.path("annotations"), "late=\"yes\"").unwrap();
        let expected = map(&[("annotation.late", "yes"), ("app", "shop"), ("k8s.pod.name", "pod")]);
        assert_eq!(running.next_event().await, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_that_is_not_there_yet_is_looked_for_now_and_then() {
        let volume = Volume::new();
        let late = LabelsConfig { labels_file: Some(volume.path("late/labels")), ..LabelsConfig::default() };
        let mut running = Running::with(late).await;
        sleep(PERIOD / 2).await;
        fs::create_dir(volume.path("late")).unwrap();
        fs::write(volume.path("late/labels"), "app=\"shop\"").unwrap();
        assert_eq!(running.next_event().await, map(&[("app", "shop")]));
    }

    #[tokio::test]
    async fn without_files_there_is_nothing_to_keep_up_to_date() {
        let config = LabelsConfig { explicit: map(&[("a", "b")]), ..LabelsConfig::default() };
        let (herald, _news) = Herald::new(Env::real().nature);
        let (labels, labeller) = Labeller::open(&Env::real(), config, herald).await;
        assert!(labeller.is_none());
        assert_eq!(**labels.borrow(), map(&[("a", "b")]));
    }

    #[test]
    fn only_files_of_bounded_size_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap().set_len(MAX_FILE).unwrap();
        read_file(&path).unwrap();
        File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
        assert!(read_file(&path).unwrap_err().to_string().contains("larger"));
        assert!(read_file(dir.path()).unwrap_err().to_string().contains("not a file"));
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).unwrap();
        assert!(read_file(&pipe).unwrap_err().to_string().contains("not a file"));
    }

    /// A directory that the kubelet fills.
    struct Volume(tempfile::TempDir);

    impl Volume {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        /// As `AtomicWriter` in Kubernetes' `pkg/volume/util/atomic_writer.go` does it.
        fn project(&self, files: &[(&str, &str)]) {
            let old = fs::read_link(self.path("..data")).ok();
            let data = tempfile::Builder::new().prefix("..2026_").tempdir_in(self.0.path()).unwrap().keep();
            for (name, contents) in files {
                fs::write(data.join(name), contents).unwrap();
                if fs::symlink_metadata(self.path(name)).is_err() {
                    symlink(Path::new("..data").join(name), self.path(name)).unwrap();
                }
            }
            symlink(data.file_name().unwrap(), self.path("..data_tmp")).unwrap();
            fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
            if let Some(old) = old {
                fs::remove_dir_all(self.0.path().join(old)).unwrap();
            }
        }
    }

    struct Running {
        labels: watch::Receiver<Labels>,
        news: mpsc::Receiver<News>,
        task: JoinHandle<()>,
    }

    impl Running {
        async fn start(volume: &Volume) -> Self {
            Self::with(LabelsConfig {
                identity: map(&[("k8s.pod.name", "pod")]),
                labels_file: Some(volume.path("labels")),
                annotations_file: Some(volume.path("annotations")),
                ..LabelsConfig::default()
            })
            .await
        }

        async fn with(config: LabelsConfig) -> Self {
            let env = Env::real();
            let (herald, news) = Herald::new(env.nature.clone());
            let (labels, labeller) = Labeller::open(&env, config, herald).await;
            Self { labels, news, task: tokio::spawn(labeller.unwrap().run()) }
        }

        fn current(&self) -> BTreeMap<String, String> {
            (**self.labels.borrow()).clone()
        }

        async fn next_event(&mut self) -> BTreeMap<String, String> {
            let news = timeout(2 * PERIOD, self.news.recv()).await.expect("the change is noticed").unwrap();
            let Event::Labels(event::Labels { labels }) = news.event else { panic!("{news:?}") };
            labels
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    fn hello(labels: BTreeMap<String, String>) -> Hello {
        Hello {
            build: "b".repeat(64).parse().unwrap(),
            step: "main".parse().unwrap(),
            producer: ProducerId([7; 16]),
            oldest: 0,
            next: u64::MAX,
            labels,
            agent: "phonehome-agent/1.2.3".into(),
            capabilities: Vec::new(),
        }
    }

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }
}
