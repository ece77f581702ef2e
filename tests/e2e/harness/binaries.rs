//! The programs, built once with the profile of the tests.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// `phonehome-agent`.
pub(crate) fn agent() -> PathBuf {
    directory().join("phonehome-agent")
}

/// `phonehome-server`.
pub(crate) fn server() -> PathBuf {
    directory().join("phonehome-server")
}

/// `collector`, the server that tests kill: cargo has built it before this test, a directory of others may have its own.
pub(crate) fn collector() -> PathBuf {
    let others = env::var_os("PHONEHOME_BIN_DIR").map(|directory| PathBuf::from(directory).join("collector"));
    others.filter(|path| path.exists()).unwrap_or_else(|| env!("CARGO_BIN_EXE_collector").into())
}

/// Where both are. `PHONEHOME_BIN_DIR` names a directory with others, static ones say.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| match env::var_os("PHONEHOME_BIN_DIR") {
        Some(directory) => directory.into(),
        None => build(),
    })
}

/// Builds into the directory that this test was built into: `TARGET/PROFILE/deps/e2e-HASH`.
fn build() -> PathBuf {
    let test = env::current_exe().unwrap();
    let directory = test.ancestors().nth(2).expect("a test lies in TARGET/PROFILE/deps");
    let profile = match directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(profile) => profile,
    };
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into()));
    cargo.args(["build", "--locked", "--quiet", "-p", "phonehome-agent", "-p", "phonehome-server"]);
    cargo.args(["--profile", profile]).arg("--target-dir").arg(directory.parent().expect("TARGET is above PROFILE"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    // What cargo tells this test about itself would look like a change to build scripts that watch it.
    let about_the_test = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_", "CARGO_BIN_", "CARGO_PRIMARY_"];
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| about_the_test.iter().any(|prefix| name.starts_with(prefix))) {
            cargo.env_remove(name);
        }
    }
    assert!(cargo.status().unwrap().success(), "the programs cannot be built");
    directory.to_owned()
}
