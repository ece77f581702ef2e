//! `GET /metrics`: OpenMetrics 1.0. [`page`] is the one place that names every metric.

use std::{fmt, sync::Arc};

use axum::{
    extract::{MatchedPath, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::header::CONTENT_TYPE;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text::encode},
    metrics::MetricType,
    registry::{Registry, Unit},
};

use super::{auth::Caller, problem::Problem};
use crate::{
    builds::BuildPhase,
    meter::{Count, Histogram, Meter},
    serve::Standing,
};

/// Content type of OpenMetrics.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(crate) async fn metrics(
    State(standing): State<Arc<Standing>>,
    caller: Result<Caller, Problem>,
) -> Result<Response, Problem> {
    if !standing.settings.metrics_public {
        caller?.may_read()?;
    }
    let reading = standing.clone();
    let text = standing.shared.env.blocking(move || render(Reading::take(&reading))).await;
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], text).into_response())
}

/// Counts requests by their route, of which there are few, never by their path.
pub(crate) async fn count(State(standing): State<Arc<Standing>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    standing.shared.store.meter().requests.add((route, response.status().as_u16()));
    response
}

/// What is not counted but looked at.
#[derive(Debug, Default)]
struct Reading {
    meter: Arc<Meter>,
    agents: u64,
    strangers: u64,
    strangers_evicted: u64,
    /// Those in memory: waiting, running, stopping, ended.
    builds: [u64; 4],
    disk_free: Option<u64>,
    open_files: Option<u64>,
    readers: u64,
    certificate_end: Option<u64>,
    lifecycle_dropped: u64,
}

impl Reading {
    fn take(standing: &Standing) -> Self {
        let shared = &standing.shared;
        let mut builds = [0; 4];
        for build in shared.builds.all() {
            builds[match build.phase() {
                BuildPhase::Waiting => 0,
                BuildPhase::Running => 1,
                BuildPhase::Stopping => 2,
                BuildPhase::Ended => 3,
            }] += 1;
        }
        let disk = rustix::fs::statvfs(shared.store.data()).ok();
        let certificate = standing.keys.as_ref().and_then(|keys| keys.current().not_after);
        Self {
            meter: shared.store.meter().clone(),
            agents: shared.agents.load(std::sync::atomic::Ordering::Relaxed),
            strangers: shared.strangers.count() as u64,
            strangers_evicted: shared.strangers.evicted(),
            builds,
            disk_free: disk.map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize)),
            readers: standing.readers.count() as u64,
            open_files: std::fs::read_dir("/proc/self/fd").ok().map(|files| files.count() as u64),
            certificate_end: certificate.map(|micros| micros / 1_000_000),
            lifecycle_dropped: shared.lifecycle.get().map_or(0, |lifecycle| lifecycle.dropped()),
        }
    }
}

fn render(reading: Reading) -> String {
    let mut registry = Registry::with_prefix("phonehome");
    registry.register_collector(Box::new(reading));
    let mut text = String::new();
    encode(&mut text, &registry).expect("a text takes what is written");
    text
}

impl Collector for Reading {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        page(self, &mut Page(encoder))
    }
}

/// Every metric, with what it means. `docs/metrics.md` has the same table.
fn page(now: &Reading, page: &mut Page<'_>) -> fmt::Result {
    let meter = &now.meter;
    page.info("build", "The version that runs", ("version", env!("CARGO_PKG_VERSION")))?;
    page.gauge("agents", "Connected agents", Some(now.agents))?;
    page.gauge("strangers", "Sockets that have not shown a valid token", Some(now.strangers))?;
    page.counter("strangers_evicted", "Such sockets that were closed for newer ones", now.strangers_evicted)?;
    let states = ["waiting", "running", "stopping", "ended"].into_iter().zip(now.builds);
    page.gauges("builds", "Builds in memory, by state; ended ones leave it after some minutes", "state", states)?;
    let verdicts = meter.verdicts.values();
    let outcomes = ["cancelled", "error", "failed", "lost", "succeeded", "timed-out"];
    let verdicts = outcomes.map(|outcome| (outcome, verdicts.get(outcome).copied().unwrap_or(0)));
    page.counters(
        "verdicts",
        "Builds that have ended, by outcome",
        ["outcome"],
        verdicts.map(|(key, n)| ([key.to_owned()], n)),
    )?;
    page.count("records_received", "New records from agents", &meter.records_received)?;
    page.count("payload_received_bytes", "Payload of these records", &meter.bytes_received)?;
    page.count(
        "records_acknowledged",
        "Records stored as durably as promised, and acknowledged",
        &meter.records_acknowledged,
    )?;
    page.count("payload_acknowledged_bytes", "Payload of these records", &meter.bytes_acknowledged)?;
    page.histogram("ack_latency", "From the first record that waits to its acknowledgement", &meter.ack_latency)?;
    page.histogram("commit_duration", "Rounds of the store: write, sync, let it be known", &meter.commit_duration)?;
    page.count(
        "attempts_synced",
        "Attempts whose files were written and synced, round by round",
        &meter.attempts_synced,
    )?;
    page.gauge("open_files", "Descriptors of the process, sockets included", now.open_files)?;
    page.gauge("readers", "Requests that read or follow a log", Some(now.readers))?;
    let refusals = meter.refusals.values().into_iter().map(|(reason, count)| ([reason], count));
    page.counters(
        "refused_connections",
        "Agents that were turned away, by HTTP status or close code",
        ["reason"],
        refusals,
    )?;
    let requests = meter.requests.values().into_iter();
    let requests = requests.map(|((route, status), count)| ([route, status.to_string()], count));
    page.counters(
        "http_requests",
        "Requests, by the template of their route and by status",
        ["route", "status"],
        requests,
    )?;
    page.count("sealed_bytes", "Bytes of logs that were compressed, before that", &meter.bytes_sealed)?;
    page.count("expired_builds", "Builds that retention has removed", &meter.builds_expired)?;
    page.count("expired_bytes", "Bytes on the disk that this has freed", &meter.bytes_expired)?;
    page.count(
        "quota_dropped_bytes",
        "Bytes that were not stored because their build had its quota",
        &meter.bytes_over_quota,
    )?;
    page.gauge("disk_free_bytes", "Room in the data directory for this user", now.disk_free)?;
    page.gauge("certificate_expiry_timestamp_seconds", "When the certificate in use ends", now.certificate_end)?;
    page.counter(
        "lifecycle_lines_dropped",
        "Lines of the lifecycle log that could not be written in time",
        now.lifecycle_dropped,
    )
}

/// Where metrics are written to.
struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    fn of(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        write: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        write(self.0.encode_descriptor(name, help, None, kind)?)
    }

    fn info(&mut self, name: &str, help: &str, label: (&str, &str)) -> fmt::Result {
        self.of(name, help, MetricType::Info, |mut metric| metric.encode_info(&[label]))
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.of(name, help, MetricType::Counter, |mut metric| metric.encode_counter::<NoLabelSet, _, u64>(&value, None))
    }

    fn count(&mut self, name: &str, help: &str, count: &Count) -> fmt::Result {
        self.counter(name, help, count.value())
    }

    fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        labels: [&'static str; N],
        values: impl IntoIterator<Item = ([String; N], u64)>,
    ) -> fmt::Result {
        self.of(name, help, MetricType::Counter, |mut metric| {
            values.into_iter().try_for_each(|(texts, value)| {
                let mut texts = texts.into_iter();
                let set = labels.map(|label| (label, texts.next().unwrap_or_default()));
                metric.encode_family(&set)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
            })
        })
    }

    /// Nothing is told of what is not known.
    fn gauge(&mut self, name: &str, help: &str, value: Option<u64>) -> fmt::Result {
        self.of(name, help, MetricType::Gauge, |mut metric| match value {
            Some(value) => metric.encode_gauge(&value),
            None => Ok(()),
        })
    }

    fn gauges<'a>(
        &mut self,
        name: &str,
        help: &str,
        label: &'static str,
        values: impl IntoIterator<Item = (&'a str, u64)>,
    ) -> fmt::Result {
        self.of(name, help, MetricType::Gauge, |mut metric| {
            values
                .into_iter()
                .try_for_each(|(text, value)| metric.encode_family(&[(label, text)])?.encode_gauge(&value))
        })
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        let (sum, buckets) = histogram.values();
        let count = buckets.iter().map(|(_, count)| count).sum();
        let mut metric = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_every_metric_with_what_it_means() {
        let text = render(Reading::default());
        let documented: Vec<_> = include_str!("../../../../docs/metrics.md")
            .lines()
            .filter(|line| line.starts_with("| `phonehome_"))
            .collect();
        let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let helps = text.lines().filter_map(|line| line.strip_prefix("# HELP "));
        let told: Vec<_> = kinds
            .zip(helps)
            .map(|(kind, help)| {
                let (name, kind) = kind.split_once(' ').unwrap();
                let suffix = match kind {
                    "counter" => "_total",
                    "info" => "_info",
                    _ => "",
                };
                format!("| `{name}{suffix}` | {kind} | {} |", help.split_once(' ').unwrap().1.trim_end_matches('.'))
            })
            .collect();
        assert_eq!(documented, told, "as it should be:\n{}\n", told.join("\n"));
    }

    #[test]
    fn values_are_told_in_the_form_of_openmetrics() {
        let meter = Meter::default();
        meter.records_received.add(3);
        meter.verdicts.add("lost");
        meter.refusals.add("401".into());
        meter.requests.add(("/api/v1/builds/{id}".into(), 200));
        meter.ack_latency.observe(std::time::Duration::from_millis(2));
        let text = render(Reading { meter: Arc::new(meter), agents: 2, disk_free: Some(7), ..Reading::default() });
        for line in [
            "phonehome_agents 2",
            "phonehome_records_received_total 3",
            "phonehome_builds{state=\"waiting\"} 0",
            "phonehome_verdicts_total{outcome=\"lost\"} 1",
            "phonehome_verdicts_total{outcome=\"failed\"} 0",
            "phonehome_refused_connections_total{reason=\"401\"} 1",
            "phonehome_http_requests_total{route=\"/api/v1/builds/{id}\",status=\"200\"} 1",
            "phonehome_ack_latency_seconds_bucket{le=\"0.001\"} 0",
            "phonehome_ack_latency_seconds_bucket{le=\"0.0025\"} 1",
            "phonehome_ack_latency_seconds_bucket{le=\"+Inf\"} 1",
            "phonehome_ack_latency_seconds_count 1",
            "phonehome_disk_free_bytes 7",
            concat!("phonehome_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|told| told == line), "{line} is not in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }
}
