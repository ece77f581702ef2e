//! Neither program needs anybody but the other.

use crate::harness::{Process, Scene, arguments, builder, server, skipped, works};

/// No route, no resolver, nothing that would lead to an orchestrator: only the loopback interface.
#[tokio::test]
async fn both_programs_run_where_nothing_else_can_be_reached() {
    let options: &[&str] = if works("unshare", &["--net", "true"]) {
        &["--net"]
    } else if works("unshare", &["--map-root-user", "--net", "true"]) {
        &["--map-root-user", "--net"]
    } else {
        return skipped("there is no unshare that may make a network namespace");
    };
    if !works("ip", &["-Version"]) {
        return skipped("there is no ip to set up the loopback interface");
    }
    let scene = Scene::new();
    let launcher = builder(&scene, &[], "cat /proc/net/route; env; echo err >&2; exit 3");
    let mut command = scene.command("unshare");
    command.args(options).args(["--", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    // Every address of this machine, as by default: without a default route the loopback address is advertised.
    command.arg(server()).args(arguments(&["--listen", "0.0.0.0:0"])).args(["--", "sh", "-c", &launcher]);
    let mut hook = Process::spawn(&mut command);
    let code = hook.ended().await;
    let stdout = String::from_utf8(hook.stdout.all().await).unwrap();
    let stderr = String::from_utf8(hook.stderr.all().await).unwrap();
    assert_eq!(code, 3, "{stderr}");
    let routes = stdout.lines().take_while(|line| !line.contains('=')).count();
    assert_eq!(routes, 1, "the heading and no route: {stdout}");
    assert!(stdout.contains("PHONEHOME_URL=wss://127.0.0.1:"), "{stdout}");
    assert!(!stdout.contains("KUBERNETES"), "{stdout}");
    assert!(stderr.starts_with("err\n") && stderr.contains("the log is complete"), "{stderr}");
}
