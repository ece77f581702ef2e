//! A repository with a pre-receive hook, and somebody who pushes to it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::sshd::Sshd;
use crate::harness::{Process, Scene, arguments, builder, server};

/// `remote.git`, which is pushed to, and `work`, which is pushed from.
#[derive(Debug)]
pub(super) struct Repository {
    scene: Scene,
}

impl Repository {
    pub(super) fn new() -> Self {
        let repository = Self { scene: Scene::new() };
        let (remote, work) = (repository.remote(), repository.work());
        repository.git(repository.scene.dir(), &["init", "--quiet", "--bare", "-b", "main", remote.to_str().unwrap()]);
        repository.git(repository.scene.dir(), &["init", "--quiet", "-b", "main", work.to_str().unwrap()]);
        repository
    }

    pub(super) fn scene(&self) -> &Scene {
        &self.scene
    }

    pub(super) fn remote(&self) -> PathBuf {
        self.scene.path("remote.git")
    }

    fn work(&self) -> PathBuf {
        self.scene.path("work")
    }

    /// From now on a push is built by `script`. The flags are words for a shell.
    pub(super) fn install(&self, flags: &str, script: &str) {
        self.install_launcher(flags, ":", script);
    }

    /// The same with something for the launcher to do before it starts the builder.
    pub(super) fn install_launcher(&self, flags: &str, before: &str, script: &str) {
        let launcher = self.scene.write("launcher.sh", format!("{before}\n{}\n", builder(&self.scene, &[], script)));
        // Over ssh nothing comes with the pusher, so the hook itself says where it belongs.
        let hook = format!(
            "#!/bin/sh\nexport E2E_SCENE={}\nexec {} {} {flags} -- sh {}\n",
            self.scene.dir().display(),
            server().display(),
            arguments(&[]).join(" "),
            launcher.display()
        );
        let path = self.remote().join("hooks/pre-receive");
        fs::write(&path, hook).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Commits a file with these contents and returns the commit's id.
    pub(super) fn commit(&self, contents: &str) -> String {
        fs::write(self.work().join("file"), format!("{contents}\n")).unwrap();
        self.git(&self.work(), &["add", "file"]);
        self.git(&self.work(), &["commit", "--quiet", "-m", contents]);
        self.git(&self.work(), &["rev-parse", "HEAD"])
    }

    /// Starts to push to `main`.
    pub(super) fn push(&self) -> Process {
        self.push_to("refs/heads/main")
    }

    pub(super) fn push_to(&self, reference: &str) -> Process {
        let refspec = format!("HEAD:{reference}");
        Process::spawn(&mut self.push_command(&[self.remote().to_str().unwrap(), &refspec]))
    }

    /// Starts to push to `main` over ssh.
    pub(super) fn push_over(&self, sshd: &Sshd) -> Process {
        let mut command = self.push_command(&[&sshd.url(&self.remote()), "HEAD:refs/heads/main"]);
        Process::spawn(command.env("GIT_SSH_COMMAND", sshd.client_command()))
    }

    fn push_command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = self.scene.command("git");
        // What git itself would show of a build's control sequences (since 2.55) is not what is tested.
        command.args(["-c", "sideband.allowControlCharacters=true", "push"]).args(arguments);
        command.current_dir(self.work()).env("GIT_CONFIG_NOSYSTEM", "1");
        command
    }

    /// The commit of a branch of the remote repository, if there is such a branch.
    pub(super) fn tip(&self, reference: &str) -> Option<String> {
        let found = self.git(&self.remote(), &["for-each-ref", "--format=%(objectname)", reference]);
        Some(found).filter(|found| !found.is_empty())
    }

    fn git(&self, directory: &Path, arguments: &[&str]) -> String {
        let mut command = Command::new("git");
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", self.scene.dir());
        command.env("GIT_CONFIG_NOSYSTEM", "1").current_dir(directory);
        command.args(["-c", "user.name=Pusher", "-c", "user.email=pusher@example.org"]).args(arguments);
        let output = command.output().unwrap();
        assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }
}

/// What git showed of the remote side, line by line as a screen without a terminal's abilities has it: what a carriage
/// return ended and something else replaced is not there any more.
pub(super) fn remote_lines(told: &[u8]) -> Vec<String> {
    let text = String::from_utf8(told.to_vec()).expect("git shows text");
    let lines = text.lines().filter_map(|line| line.rsplit('\r').next()?.strip_prefix("remote: "));
    // git ends each with eight blanks, to wipe what a longer line may have left.
    lines.map(|line| line.strip_suffix("        ").unwrap_or(line).to_owned()).collect()
}
