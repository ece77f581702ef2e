//! Which of many things was used least recently.

use std::collections::BTreeMap;

/// Keys by the time of their last use.
#[derive(Debug)]
pub(super) struct Recency<K> {
    /// Uses so far.
    uses: u64,
    by_use: BTreeMap<u64, K>,
    last_use: BTreeMap<K, u64>,
}

impl<K: Ord + Clone> Recency<K> {
    pub(super) fn new() -> Self {
        Self { uses: 0, by_use: BTreeMap::new(), last_use: BTreeMap::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.last_use.len()
    }

    /// It is used now.
    pub(super) fn touch(&mut self, key: &K) {
        self.remove(key);
        self.uses += 1;
        self.by_use.insert(self.uses, key.clone());
        self.last_use.insert(key.clone(), self.uses);
    }

    pub(super) fn remove(&mut self, key: &K) {
        if let Some(at) = self.last_use.remove(key) {
            self.by_use.remove(&at);
        }
    }

    /// Takes the one whose last use is the longest ago.
    pub(super) fn pop(&mut self) -> Option<K> {
        let (_, key) = self.by_use.pop_first()?;
        self.last_use.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_used_the_longest_ago_comes_first() {
        let mut recency = Recency::new();
        [1, 2, 3, 1, 4].iter().for_each(|key| recency.touch(key));
        recency.remove(&3);
        recency.remove(&9);
        assert_eq!(recency.len(), 3);
        assert_eq!(std::iter::from_fn(|| recency.pop()).collect::<Vec<_>>(), [2, 1, 4]);
    }
}
