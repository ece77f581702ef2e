//! Which ended builds go, so that the rest keeps within the limits. Pure: [`store::expire`](crate::store::expire) removes.

use std::time::Duration;

use phonehome_proto::{frame::UnixMicros, id::BuildId};

/// What may be kept of ended builds. No limit keeps everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Since their end.
    pub(crate) keep_for: Option<Duration>,
    /// How many.
    pub(crate) keep_builds: Option<u64>,
    /// What they take on the disk together, bytes.
    pub(crate) keep_bytes: Option<u64>,
}

/// A build that has its verdict. One that runs is none of these, and never goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) id: BuildId,
    pub(crate) ended: UnixMicros,
    /// What it takes on the disk.
    pub(crate) bytes: u64,
}

/// A build that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expiry {
    pub(crate) id: BuildId,
    pub(crate) ended: UnixMicros,
    pub(crate) bytes: u64,
    /// The first limit that it goes for.
    pub(crate) rule: Rule,
}

/// A limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    Age,
    Bytes,
    Count,
}

/// The builds that go, the oldest first. What goes is older than everything that stays.
pub(crate) fn plan(ended: impl Iterator<Item = Ended>, policy: &Policy, now: UnixMicros) -> Vec<Expiry> {
    let mut builds: Vec<_> = ended.collect();
    builds.sort_unstable_by(|one, other| (one.ended, &one.id).cmp(&(other.ended, &other.id)));
    let (mut count, mut bytes) = (builds.len() as u64, builds.iter().map(|build| u128::from(build.bytes)).sum());
    let mut expiries = Vec::new();
    for Ended { id, ended, bytes: own } in builds {
        let Some(rule) = policy.broken_by(now.saturating_sub(ended), count, bytes) else { break };
        count -= 1;
        bytes -= u128::from(own);
        expiries.push(Expiry { id, ended, bytes: own, rule });
    }
    expiries
}

impl Policy {
    /// The limit for which the oldest of `count` builds with `bytes` goes.
    fn broken_by(&self, age: UnixMicros, count: u64, bytes: u128) -> Option<Rule> {
        if self.keep_for.is_some_and(|limit| u128::from(age) > limit.as_micros()) {
            Some(Rule::Age)
        } else if self.keep_builds.is_some_and(|limit| count > limit) {
            Some(Rule::Count)
        } else if self.keep_bytes.is_some_and(|limit| bytes > u128::from(limit)) {
            Some(Rule::Bytes)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::{option, prelude::*};

    use super::*;

    #[test]
    fn the_oldest_go_first_and_each_says_for_which_limit() {
        let builds = [("c", 30, 5), ("a", 10, 5), ("d", 40, 5), ("b", 20, 100), ("e", 40, 5)];
        let builds = builds.map(|(id, ended, bytes)| build(id, ended, bytes));
        let policy = Policy { keep_for: Some(Duration::from_micros(35)), keep_builds: Some(3), keep_bytes: Some(10) };
        let gone: Vec<_> = plan(builds.into_iter(), &policy, 50).into_iter().map(|gone| (gone.id, gone.rule)).collect();
        let told = [("a", Rule::Age), ("b", Rule::Count), ("c", Rule::Bytes)];
        assert_eq!(gone, told.map(|(id, rule)| (id.parse().unwrap(), rule)));
    }

    #[test]
    fn without_limits_everything_stays_and_a_clock_that_went_back_makes_nothing_old() {
        let builds = || [build("a", 10, u64::MAX), build("b", 20, u64::MAX)].into_iter();
        assert!(plan(builds(), &Policy::default(), u64::MAX).is_empty());
        let young = Policy { keep_for: Some(Duration::ZERO), ..Policy::default() };
        assert!(plan(builds(), &young, 10).is_empty());
        assert_eq!(plan(builds(), &young, 11).len(), 1);
    }

    proptest! {
        #[test]
        fn what_stays_keeps_within_every_limit_and_nothing_goes_for_no_reason(
            builds in prop::collection::vec((0..50u64, 0..50u64), 0..20),
            (age, count, bytes) in (option::of(0..60u64), option::of(0..20u64), option::of(0..500u64)),
            now in 0..80u64,
        ) {
            let mut builds: Vec<_> = builds.iter().enumerate().map(|(at, &(ended, bytes))| build(&format!("b{at:02}"), ended, bytes)).collect();
            let policy = Policy { keep_for: age.map(Duration::from_micros), keep_builds: count, keep_bytes: bytes };
            let gone = plan(builds.clone().into_iter(), &policy, now);
            builds.sort_by_key(|build| (build.ended, build.id.clone()));
            let (left, stays) = builds.split_at(gone.len());
            prop_assert!(left.iter().zip(&gone).all(|(build, gone)| build.id == gone.id && build.bytes == gone.bytes));
            let sum = |builds: &[Ended]| builds.iter().map(|build| build.bytes).sum::<u64>();
            prop_assert!(age.is_none_or(|limit| stays.iter().all(|build| now.saturating_sub(build.ended) <= limit)));
            prop_assert!(count.is_none_or(|limit| stays.len() as u64 <= limit));
            prop_assert!(bytes.is_none_or(|limit| sum(stays) <= limit));
            for (at, gone) in gone.iter().enumerate() {
                let with_it = &builds[at..];
                let is_asked_for = match gone.rule {
                    Rule::Age => now - gone.ended > age.unwrap(),
                    Rule::Bytes => sum(with_it) > bytes.unwrap(),
                    Rule::Count => with_it.len() as u64 > count.unwrap(),
                };
                prop_assert!(is_asked_for, "{gone:?}");
            }
        }
    }

    /// Builds end every few minutes, and once an hour what is too much goes.
    #[test]
    fn for_a_week_the_limits_hold_after_every_hour() {
        let policy = Policy { keep_for: Some(2 * DAY), keep_builds: Some(450), keep_bytes: Some(4_000_000_000) };
        let (mut random, mut now, mut builds, mut rules) = (Random(7), 0, Vec::new(), Vec::new());
        for hour in 1..=7 * 24 {
            while now < hour * HOUR {
                let size = 1 << random.below(if (hour / 24) % 3 == 2 { 30 } else { 20 });
                builds.push(build(&format!("build-{now}"), now, random.below(size)));
                // Every third day is quiet, so that each limit is the one that counts at some time.
                now += 60_000_000 * (1 + random.below(if (hour / 24) % 3 == 1 { 60 } else { 8 }));
            }
            let gone = plan(builds.clone().into_iter(), &policy, hour * HOUR);
            builds.retain(|build| gone.iter().all(|gone| gone.id != build.id));
            rules.extend(gone.iter().map(|gone| gone.rule));
            let oldest = builds.iter().map(|build| build.ended).min().unwrap_or(u64::MAX);
            assert!(hour * HOUR <= oldest.saturating_add(2 * 24 * HOUR), "hour {hour}");
            assert!(builds.len() <= 450, "hour {hour}");
            assert!(builds.iter().map(|build| build.bytes).sum::<u64>() <= 4_000_000_000, "hour {hour}");
            assert!(!builds.is_empty(), "hour {hour}");
        }
        for rule in [Rule::Age, Rule::Count, Rule::Bytes] {
            assert!(rules.contains(&rule), "no build has gone for {rule:?}");
        }
    }

    const HOUR: u64 = 3_600_000_000;
    const DAY: Duration = Duration::from_micros(24 * HOUR);

    fn build(id: &str, ended: u64, bytes: u64) -> Ended {
        Ended { id: id.parse().unwrap(), ended, bytes }
    }

    /// splitmix64, by Sebastiano Vigna.
    struct Random(u64);

    impl Random {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut mixed = self.0;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            (mixed ^ (mixed >> 31)) % limit.max(1)
        }
    }
}
