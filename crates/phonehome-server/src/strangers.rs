//! Sockets whose owners have not shown a valid token yet: few of them, and a newcomer always gets a place.
//!
//! Whoever opens sockets and says nothing must not keep honest agents out. So nobody waits for a place: when there is
//! none, the oldest stranger gives way, first among those of the newcomer's own address, then among all. An agent needs
//! a place only as long as its handshake takes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// How many strangers there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StrangerLimits {
    /// In all.
    pub(crate) total: usize,
    /// From one address.
    pub(crate) per_address: usize,
}

impl Default for StrangerLimits {
    fn default() -> Self {
        Self { total: 512, per_address: 64 }
    }
}

/// All strangers of a server.
#[derive(Debug, Clone)]
pub(crate) struct Strangers(Arc<Mutex<Table>>);

/// A stranger's place. It is free again when this is dropped or the stranger is known.
#[derive(Debug)]
pub(crate) struct Stranger {
    number: u64,
    gives_way: CancellationToken,
    strangers: Strangers,
}

impl Strangers {
    pub(crate) fn new(limits: StrangerLimits) -> Self {
        Self(Arc::new(Mutex::new(Table::new(limits))))
    }

    /// Gives a newcomer a place.
    pub(crate) fn admit(&self, peer: IpAddr) -> Stranger {
        let gives_way = CancellationToken::new();
        let (number, evicted) = self.lock().admit(Origin::of(peer), gives_way.clone());
        for evicted in evicted {
            evicted.cancel();
        }
        Stranger { number, gives_way, strangers: self.clone() }
    }

    /// Sets other limits, for those who come from now on.
    pub(crate) fn limit(&self, limits: StrangerLimits) {
        self.lock().limits = limits;
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lock().places.len()
    }

    /// How many had to give way so far.
    pub(crate) fn evicted(&self) -> u64 {
        self.lock().evicted
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Stranger {
    /// It has shown a valid token: it does not give way any more. Once it has, it stays so.
    pub(crate) fn become_known(&self) {
        self.strangers.lock().leave(self.number);
    }

    /// Completes when it has to go. Cancel safe.
    pub(crate) async fn gives_way(&self) {
        self.gives_way.cancelled().await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.become_known();
    }
}

/// Who shares a limit: an IPv4 address, or the /64 that one IPv6 host usually has to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Origin {
    V4(Ipv4Addr),
    V6([u16; 4]),
}

impl Origin {
    fn of(peer: IpAddr) -> Self {
        match peer.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [first, second, third, fourth, ..] = address.segments();
                Self::V6([first, second, third, fourth])
            }
        }
    }
}

/// Who has a place; generic over what is done to somebody who has to go.
#[derive(Debug)]
struct Table<T = CancellationToken> {
    limits: StrangerLimits,
    /// Numbers are given in the order of arrival.
    next: u64,
    places: BTreeMap<u64, (Origin, T)>,
    by_origin: HashMap<Origin, BTreeSet<u64>>,
    evicted: u64,
}

impl<T> Table<T> {
    fn new(limits: StrangerLimits) -> Self {
        Self { limits, next: 0, places: BTreeMap::new(), by_origin: HashMap::new(), evicted: 0 }
    }

    /// Takes in a newcomer; says its number and who has to go for it.
    fn admit(&mut self, origin: Origin, handle: T) -> (u64, Vec<T>) {
        let mut gone = Vec::new();
        let own = self.by_origin.get(&origin);
        if let Some(oldest) = own.filter(|own| own.len() >= self.limits.per_address.max(1)).and_then(BTreeSet::first) {
            gone.extend(self.leave(*oldest));
        }
        if self.places.len() >= self.limits.total.max(1)
            && let Some((&oldest, _)) = self.places.first_key_value()
        {
            gone.extend(self.leave(oldest));
        }
        self.evicted += gone.len() as u64;
        let number = self.next;
        self.next += 1;
        self.places.insert(number, (origin, handle));
        self.by_origin.entry(origin).or_default().insert(number);
        (number, gone)
    }

    /// A place is free again, if it was not before.
    fn leave(&mut self, number: u64) -> Option<T> {
        let (origin, handle) = self.places.remove(&number)?;
        if let Some(own) = self.by_origin.get_mut(&origin) {
            own.remove(&number);
            if own.is_empty() {
                self.by_origin.remove(&origin);
            }
        }
        Some(handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: StrangerLimits = StrangerLimits { total: 4, per_address: 2 };

    #[test]
    fn the_oldest_of_the_same_address_gives_way_first() {
        let mut table = Table::new(LIMITS);
        assert!(table.admit(origin("10.0.0.1"), 1).1.is_empty());
        assert!(table.admit(origin("10.0.0.2"), 2).1.is_empty());
        assert!(table.admit(origin("10.0.0.2"), 3).1.is_empty());
        assert_eq!(table.admit(origin("10.0.0.2"), 4).1, [2]);
        assert_eq!(table.admit(origin("10.0.0.2"), 5).1, [3]);
        assert_eq!((table.places.len(), table.evicted), (3, 2));
    }

    #[test]
    fn when_all_places_are_taken_the_oldest_of_all_gives_way() {
        let mut table = Table::new(LIMITS);
        for number in 1..=4 {
            assert!(table.admit(origin(&format!("10.0.0.{number}")), number).1.is_empty());
        }
        assert_eq!(table.admit(origin("10.0.0.9"), 9).1, [1]);
        assert_eq!(table.admit(origin("10.0.0.4"), 10).1, [2]);
        assert_eq!(table.places.len(), 4);
    }

    #[test]
    fn who_is_known_or_gone_takes_no_place() {
        let mut table = Table::new(LIMITS);
        for round in 0..10 {
            let (number, gone) = table.admit(origin("10.0.0.1"), round);
            assert!(gone.is_empty());
            assert_eq!(table.leave(number), Some(round));
            assert_eq!(table.leave(number), None, "twice is once");
        }
        assert!(table.places.is_empty() && table.by_origin.is_empty());
    }

    #[test]
    fn a_flood_leaves_no_trace_and_never_exceeds_the_limits() {
        let mut table = Table::new(StrangerLimits { total: 512, per_address: 64 });
        for number in 0..5000_u32 {
            table.admit(origin("192.0.2.1"), number);
            assert!(table.places.len() <= 64);
        }
        for number in 0..5000_u32 {
            table.admit(Origin::V4(Ipv4Addr::from(number)), number);
            assert!(table.places.len() <= 512 && table.by_origin.len() <= 512);
        }
    }

    #[test]
    fn an_ipv6_host_is_its_network_and_a_mapped_address_is_the_address() {
        assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff::9"));
        assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
        assert_eq!(origin("::ffff:192.0.2.1"), origin("192.0.2.1"));
    }

    #[tokio::test]
    async fn who_gives_way_hears_of_it_and_who_is_known_does_not() {
        let strangers = Strangers::new(StrangerLimits { total: 1, per_address: 1 });
        let first = strangers.admit("10.0.0.1".parse().unwrap());
        first.become_known();
        let second = strangers.admit("10.0.0.2".parse().unwrap());
        let third = strangers.admit("10.0.0.3".parse().unwrap());
        second.gives_way().await;
        assert!(!first.gives_way.is_cancelled() && !third.gives_way.is_cancelled());
        assert_eq!((strangers.count(), strangers.evicted()), (1, 1));
        drop((first, second, third));
        assert_eq!(strangers.count(), 0);
    }

    fn origin(address: &str) -> Origin {
        Origin::of(address.parse().unwrap())
    }
}
