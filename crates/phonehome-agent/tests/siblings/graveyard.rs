//! The directory, and how it is named.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use crate::support::{AGENT, Container, Pod, exists, skipped};

#[test]
fn a_graveyard_that_cannot_be_written_to_is_told_once_and_the_command_lives() {
    let pod = Pod::new();
    fs::write(pod.graveyard(), "a file in its place").unwrap();
    // With a server, even one that is away, its lines come while the command runs.
    let options = ["--url", "ws://127.0.0.1:9", "--build", "b", "--linger", "0s"];
    let mut main = pod.start("main", &options, "echo alive; read _ <gate; exit 3");
    let place = pod.graveyard().join("main");
    main.log.shows(&format!("cannot write the tombstone {}: ", place.display()));
    assert_eq!(main.stdout.next(), "alive");
    fs::remove_file(pod.graveyard()).unwrap();
    pod.carved("main", "Born");
    pod.gate.open();
    let main = main.ended();
    assert_eq!(main.code, 3);
    assert_eq!(main.log.matches("cannot write the tombstone").count(), 1, "{}", main.log);
    assert_eq!(pod.tombstone("main").value("ExitCode"), Some("3"));
}

#[test]
fn one_that_is_full_or_read_only_does_not_harm_the_command_either() {
    let pod = Pod::new();
    fs::create_dir(pod.graveyard()).unwrap();
    for (options, fill, expected) in [
        ("size=4k", "head -c 4096 /dev/zero >graveyard/filler", "No space left on device"),
        ("ro", "true", "Read-only file system"),
    ] {
        let agent = format!("{AGENT} --name main --graveyard graveyard -- sh -c 'echo alive; exit 3'");
        let script = format!("mount -t tmpfs -o {options} none graveyard && {fill} && exec {agent}");
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--map-root-user", "sh", "-c", &script]).current_dir(pod.path(""));
        if !works(&mut Command::new("unshare")) {
            return skipped("unshare cannot make a mount namespace");
        }
        let main = Container::start(&mut unshare).ended();
        assert_eq!((main.code, &*main.stdout), (3, "alive\n"), "{}", main.log);
        assert!(main.log.contains(expected), "{}", main.log);
    }
}

#[test]
fn where_the_command_can_have_no_process_the_thread_that_carves_has_one() {
    let pod = Pod::new();
    fs::create_dir(pod.graveyard()).unwrap();
    for path in [pod.path(""), pod.graveyard()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let agent = pod.path("agent");
    fs::copy(AGENT, &agent).unwrap(); // to where another user can reach it
    let user = (100_000 + std::process::id()).to_string(); // nobody else's processes count
    let limited = || {
        let mut limited = Command::new("setpriv");
        limited.args(["--reuid", &user, "--regid", &user, "--clear-groups", "prlimit", "--nproc=2"]);
        limited
    };
    if !limited().arg("true").output().is_ok_and(|output| output.status.success()) {
        return skipped("setpriv and prlimit cannot limit another user");
    }
    let mut limited = limited();
    limited.arg(&agent).args(["--name", "main", "--graveyard"]).arg(pod.graveyard()).args(["--", "echo", "started"]);
    let main = Container::start(&mut limited).ended();
    assert_eq!((main.code, &*main.stdout), (126, ""), "{}", main.log);
    assert_eq!(pod.tombstone("main").value("ExitCode"), Some("126"));
}

#[test]
fn the_variables_of_kubexit_alone_configure_everything() {
    let pod = Pod::new();
    let graveyard = pod.graveyard();
    let start = |name: &str, variables: &[(&str, &str)], script: &str| {
        let mut command = pod.bare(&["--", "sh", "-c", script]);
        command.env("KUBEXIT_NAME", name).env("KUBEXIT_GRAVEYARD", &graveyard);
        command.envs([("KUBEXIT_POD_NAME", "example-job-kflt8"), ("KUBEXIT_NAMESPACE", "default")]);
        Container::start(command.envs(variables.iter().copied()))
    };
    let client = start("client", &[("KUBEXIT_BIRTH_DEPS", "server")], "cat graveyard/server");
    let server = start(
        "server",
        &[("KUBEXIT_DEATH_DEPS", "client"), ("KUBEXIT_GRACE_PERIOD", "300ms")],
        "trap '' TERM; while :; do read _ <gate; done",
    );
    let client = client.ended();
    assert_eq!(client.code, 0);
    assert!(client.stdout.contains("Born: "), "{}", client.stdout);
    assert_eq!(server.ended().code, 137);
    let late = [("KUBEXIT_BIRTH_DEPS", "nobody"), ("KUBEXIT_BIRTH_TIMEOUT", "100ms")];
    let late = start("late", &late, "true").ended();
    assert_eq!(late.code, 125);
    assert!(late.log.contains("waited 100ms for: nobody to be born (no tombstone; there are: client, server)"));
}

#[test]
fn names_that_would_lead_elsewhere_are_refused() {
    let pod = Pod::new();
    let graveyard = pod.graveyard();
    for option in ["--name", "--death-deps", "--birth-deps"] {
        for name in ["../etc", "a/b", "..", ".hidden", "-x", "a b"] {
            let mut command = pod.bare(&["--graveyard"]);
            command.arg(&graveyard).arg(format!("{option}={name}")).args(["--", "echo", "started"]);
            let refused = Container::start(&mut command).ended();
            assert_eq!((refused.code, &*refused.stdout), (125, ""), "{option} {name}");
            assert!(refused.log.contains(option), "{}", refused.log);
        }
    }
    assert!(!exists(&graveyard));
}

#[test]
fn without_siblings_nothing_is_made() {
    let pod = Pod::new();
    let mut command = pod.bare(&["--graveyard"]);
    assert_eq!(Container::start(command.arg(pod.graveyard()).args(["--", "true"])).ended().code, 0);
    assert!(!exists(pod.graveyard()));
}

fn works(unshare: &mut Command) -> bool {
    unshare.args(["--mount", "--map-root-user", "true"]).output().is_ok_and(|output| output.status.success())
}
