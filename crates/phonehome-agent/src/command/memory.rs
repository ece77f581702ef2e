//! Whether memory ran out: the count of processes that the system has killed for it in this process's control group.

use std::{fs, path::Path};

/// Where the count stands.
#[derive(Debug, Clone)]
pub(crate) struct OomKills {
    /// The file with the count, and the count at the start.
    start: Option<(String, u64)>,
}

impl OomKills {
    /// Notes the count.
    pub(crate) fn before() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self { start: counters(&groups).into_iter().find_map(|path| Some((path.clone(), read(&path)?))) }
    }

    /// Whether it has grown since. Without such a count nobody knows, and the answer is no.
    pub(crate) fn has_grown(&self) -> bool {
        self.start.as_ref().is_some_and(|(path, before)| read(path).is_some_and(|now| now > *before))
    }
}

/// Where the count may stand, the likeliest place first. In a container the path in `/proc/self/cgroup` may be the host's,
/// while the group itself is mounted as the root.
fn counters(groups: &str) -> Vec<String> {
    // HIERARCHY:CONTROLLERS:PATH (cgroups(7)); the controllers of version 2 have no name.
    let places = groups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?.trim_end_matches('/'));
        if controllers.split(',').any(|controller| controller == "memory") {
            Some(["/sys/fs/cgroup/memory", path, "memory.oom_control"])
        } else {
            controllers.is_empty().then_some(["/sys/fs/cgroup", path, "memory.events"])
        }
    });
    places.flat_map(|[mount, path, file]| [format!("{mount}{path}/{file}"), format!("{mount}/{file}")]).collect()
}

fn read(path: &str) -> Option<u64> {
    oom_kills(&fs::read_to_string(Path::new(path)).ok()?)
}

/// Lines of `NAME COUNT`; both versions call it `oom_kill` (cgroup-v1/memory.rst, cgroup-v2.rst).
fn oom_kills(counts: &str) -> Option<u64> {
    counts.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_of_control_groups_have_a_count() {
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"), Some(2));
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"), Some(7));
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\n"), None);
    }

    #[test]
    fn the_count_is_looked_for_in_the_group_and_at_the_root() {
        assert_eq!(
            counters("0::/\n"),
            ["/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory.events"].map(str::to_owned)
        );
        assert_eq!(
            counters("5:cpu,cpuacct:/a\n4:memory:/kubepods/pod1\n"),
            ["/sys/fs/cgroup/memory/kubepods/pod1/memory.oom_control", "/sys/fs/cgroup/memory/memory.oom_control"]
                .map(str::to_owned)
        );
        assert!(counters("nonsense").is_empty());
    }
}
