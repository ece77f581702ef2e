//! What came of it.

use std::{
    io::{self, Write},
    sync::atomic::Ordering,
    time::Duration,
};

use super::{Result, agent::Shared, histogram::Snapshot, options::Options, program::Usage, stored::Compared};

/// Lines for a while.
pub(crate) struct Phase {
    pub(crate) latency: Snapshot,
    /// Processors that the server kept busy.
    pub(crate) busy: Option<f64>,
    pub(crate) usage: Option<Usage>,
}

/// All that is known in the end.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) declared_in: Duration,
    pub(crate) connected_in: Duration,
    pub(crate) calm: Option<Phase>,
    /// From the kill until all were welcomed again.
    pub(crate) back_in: Option<Duration>,
    /// Until 99 of 100 lines were acknowledged within a second again.
    pub(crate) calm_in: Option<Duration>,
    pub(crate) second: Option<Phase>,
    pub(crate) drained_in: Duration,
    pub(crate) last: Option<Usage>,
    pub(crate) stored: Option<Compared>,
    rows: Vec<(&'static str, String)>,
}

impl Report {
    /// What the agents have counted.
    pub(crate) fn note(&mut self, options: &Options, shared: &Shared) {
        let seconds = options.seconds as f64 * if options.kill { 2.0 } else { 1.0 };
        if options.bomb {
            let rate = shared.bombed.load(Ordering::Relaxed) as f64 / 1e6 / seconds;
            self.rows.push(("bomb", format!("about {rate:.1} MB/s")));
        }
        self.rows.push(("connections lost", shared.cuts.load(Ordering::Relaxed).to_string()));
        self.rows.push(("forgotten by the server", shared.forgotten.load(Ordering::Relaxed).to_string()));
        if options.finish {
            let ends = shared.ends.snapshot();
            self.rows.push(("ends answered", format!("{} in {}", ends.count(), seconds_of(self.drained_in))));
        }
    }

    pub(crate) fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let mut row = |name: &str, value: &str| writeln!(out, "{name:<28}{value}");
        row("declared in", &seconds_of(self.declared_in))?;
        row("connected in", &seconds_of(self.connected_in))?;
        for (name, phase) in [("calm", &self.calm), ("calm, second life", &self.second)] {
            let Some(Phase { latency, busy, usage }) = phase else { continue };
            row(name, &times(latency))?;
            if let (Some(busy), Some(usage)) = (busy, usage) {
                let Usage { resident, peak, descriptors, .. } = usage;
                row("  server", &format!("{busy:.2} processors, {resident} MiB (peak {peak}), {descriptors} files"))?;
            }
        }
        if let Some(back_in) = self.back_in {
            let calm_in = self.calm_in.map_or("not within a minute".to_owned(), seconds_of);
            row("all back after kill -9", &format!("{}, as before: {calm_in}", seconds_of(back_in)))?;
        }
        for (name, value) in &self.rows {
            row(name, value)?;
        }
        if let Some(usage) = self.last {
            row("server at the end", &format!("{} MiB (peak {})", usage.resident, usage.peak))?;
        }
        if let Some(Compared { lines, lost, repeated }) = self.stored {
            row("stored", &format!("{lines} lines, {lost} lost, {repeated} repeated"))?;
        }
        Ok(())
    }

    /// Whether it was as it should be.
    pub(crate) fn judge(&self, options: &Options) -> Result<()> {
        let phases = || self.calm.iter().chain(&self.second);
        let peak = phases().filter_map(|phase| Some(phase.usage?.peak)).max().unwrap_or(0);
        let p99 = phases().map(|phase| phase.latency.quantile(0.99)).max().unwrap_or(0) / 1000;
        let back = self.back_in.unwrap_or_default().as_secs();
        let beyond = |limit: Option<u64>, value: u64| limit.is_some_and(|limit| value > limit);
        if self.stored.as_ref().is_some_and(|stored| stored.lost + stored.repeated > 0) {
            return Err("lines were lost or repeated".into());
        }
        if beyond(options.max_resident, peak) {
            return Err(format!("the server took {peak} MiB").into());
        }
        if beyond(options.max_p99, p99) {
            return Err(format!("99 of 100 lines were acknowledged within {p99} ms, which is too slow").into());
        }
        if beyond(options.max_back, back) {
            return Err(format!("it took {back} s until all agents were back").into());
        }
        Ok(())
    }
}

fn times(latency: &Snapshot) -> String {
    let time = |share: f64| format!("{:.0}", latency.quantile(share) as f64 / 1e3);
    let (p50, p99, max) = (time(0.5), time(0.99), time(1.0));
    format!("{} lines, acknowledged p50 {p50} p99 {p99} max {max} ms", latency.count())
}

fn seconds_of(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
