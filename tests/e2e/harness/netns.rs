//! Two machines with a cable between them, made of network namespaces.

use std::{
    net::Ipv4Addr,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// Two network namespaces, gone when dropped. Neither reaches anything but the other.
#[derive(Debug)]
pub(crate) struct Link {
    names: [String; 2],
}

/// One of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Server,
    Agent,
}

impl End {
    pub(crate) const fn address(self) -> Ipv4Addr {
        match self {
            Self::Server => Ipv4Addr::new(10, 99, 0, 1),
            Self::Agent => Ipv4Addr::new(10, 99, 0, 2),
        }
    }
}

impl Link {
    /// `None` when this machine does not allow it or has no `ip` or `nft`.
    pub(crate) fn new() -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let link = Self { names: ["s", "a"].map(|end| format!("ph{}-{number}{end}", std::process::id())) };
        link.set_up().then_some(link)
    }

    fn set_up(&self) -> bool {
        let [server, agent] = &self.names;
        // Devices of the same name do not meet: the pair is made inside.
        run("ip", &["netns", "add", server])
            && run("ip", &["netns", "add", agent])
            && run("ip", &["-n", server, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", agent])
            && [End::Server, End::Agent].into_iter().all(|end| {
                let address = format!("{}/24", end.address());
                self.ip(end, &["addr", "add", &address, "dev", "cable"])
                    && self.ip(end, &["link", "set", "cable", "up"])
                    && self.ip(end, &["link", "set", "lo", "up"])
            })
            && self.nft("add table inet faults")
            && self.nft("add chain inet faults in { type filter hook input priority 0; }")
            && self.nft("add chain inet faults out { type filter hook output priority 0; }")
    }

    fn name(&self, end: End) -> &str {
        &self.names[usize::from(end == End::Agent)]
    }

    fn ip(&self, end: End, arguments: &[&str]) -> bool {
        run("ip", &[&["-n", self.name(end)], arguments].concat())
    }

    /// Changes the rules of the server's end.
    fn nft(&self, command: &str) -> bool {
        run("ip", &["netns", "exec", self.name(End::Server), "nft", command])
    }

    /// What a command that is to run at an end begins with.
    pub(crate) fn at(&self, end: End) -> [&str; 4] {
        ["ip", "netns", "exec", self.name(end)]
    }

    /// From now on nothing gets to that end, and nobody is told.
    pub(crate) fn drop_towards(&self, end: End) {
        assert!(self.nft(&format!("add rule inet faults {} meta l4proto tcp drop", chain(end))));
    }

    /// From now on what gets to the server is answered with a reset.
    pub(crate) fn reset(&self) {
        assert!(self.nft("add rule inet faults in meta l4proto tcp reject with tcp reset"));
    }

    /// Everything gets through again.
    pub(crate) fn heal(&self) {
        assert!(self.nft("flush chain inet faults in") && self.nft("flush chain inet faults out"));
    }
}

fn chain(towards: End) -> &'static str {
    match towards {
        End::Server => "in",
        End::Agent => "out",
    }
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            run("ip", &["netns", "del", name]); // there may be none: then nothing is left to do
        }
    }
}
