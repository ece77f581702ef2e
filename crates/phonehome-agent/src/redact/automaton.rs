//! Patterns as an Aho-Corasick automaton: which of them end at a byte, and which may have begun before it.
//!
//! It is made here because two answers are needed that libraries keep to themselves: how long the longest suffix of the
//! text is that begins a pattern, so that nothing else is held back, and the longest pattern that ends here, which
//! covers all others that do. It is also wiped when dropped.
//!
//! States are numbered breadth first, so the children of a state follow one another and a state takes 17 bytes.

use std::{collections::VecDeque, ops::Range};

use zeroize::Zeroizing;

/// Where a text stands: the longest of its suffixes that begins a pattern.
pub(super) type State = u32;

/// No pattern has begun.
pub(super) const ROOT: State = 0;

pub(super) struct Automaton {
    nodes: Vec<Node>,
    /// The byte that leads to each state from its parent.
    labels: Zeroizing<Vec<u8>>,
    /// The states behind the root, by byte.
    begins: Box<[State; 256]>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Node {
    /// The first child. The last one is before the first of the next node.
    first: State,
    /// The state of the next shorter suffix that begins a pattern.
    fail: State,
    /// Length of this suffix.
    depth: u32,
    /// Length of the longest pattern that it ends with, or 0.
    longest: u32,
}

impl Automaton {
    /// `patterns` are sorted, none is empty, no two are equal, and their bytes can be counted in a [`State`].
    pub(super) fn new(patterns: &[&[u8]]) -> Self {
        let size = 1 + patterns.iter().map(|pattern| pattern.len()).sum::<usize>();
        let mut automaton = Self {
            nodes: vec![Node::default()],
            labels: Zeroizing::new(Vec::with_capacity(size)), // never moved: what moves is not wiped
            begins: Box::new([ROOT; 256]),
        };
        automaton.labels.push(0);
        automaton.grow(patterns);
        for child in automaton.children(ROOT) {
            automaton.begins[usize::from(automaton.labels[child])] = child as State;
        }
        automaton.link();
        automaton.nodes.shrink_to_fit();
        automaton
    }

    /// Makes the trie.
    fn grow(&mut self, patterns: &[&[u8]]) {
        let mut groups = VecDeque::from([patterns]); // of the patterns that begin with a state, in the order of states
        let mut state = 0;
        while let Some(mut group) = groups.pop_front() {
            let depth = self.nodes[state].depth as usize;
            self.nodes[state].first = self.nodes.len() as State;
            if let Some((shortest, longer)) = group.split_first().filter(|(shortest, _)| shortest.len() == depth) {
                self.nodes[state].longest = shortest.len() as u32;
                group = longer;
            }
            for child in group.chunk_by(|a, b| a[depth] == b[depth]) {
                self.labels.push(child[0][depth]);
                self.nodes.push(Node { depth: depth as u32 + 1, ..Node::default() });
                groups.push_back(child);
            }
            state += 1;
        }
        self.nodes.push(Node { first: self.nodes.len() as State, ..Node::default() }); // the end of the last one's
    }

    /// Links every state to its next shorter suffix. Shorter ones come first, so theirs are known.
    fn link(&mut self) {
        for parent in 0..self.labels.len() {
            for child in self.children(parent as State) {
                let fail = if parent == 0 { ROOT } else { self.next(self.nodes[parent].fail, self.labels[child]) };
                let shorter = self.nodes[fail as usize].longest;
                let node = &mut self.nodes[child];
                node.fail = fail;
                if node.longest == 0 {
                    node.longest = shorter;
                }
            }
        }
    }

    fn children(&self, state: State) -> Range<usize> {
        let at = state as usize;
        self.nodes[at].first as usize..self.nodes[at + 1].first as usize
    }

    /// Where the text stands after one more byte.
    pub(super) fn next(&self, mut state: State, byte: u8) -> State {
        while state != ROOT {
            let children = self.children(state);
            if let Ok(at) = self.labels[children.clone()].binary_search(&byte) {
                return (children.start + at) as State;
            }
            state = self.nodes[state as usize].fail;
        }
        self.begins[usize::from(byte)]
    }

    /// Length of the longest suffix that begins a pattern.
    pub(super) fn depth(&self, state: State) -> usize {
        self.nodes[state as usize].depth as usize
    }

    /// Length of the longest pattern that ends here, or 0.
    pub(super) fn longest(&self, state: State) -> usize {
        self.nodes[state as usize].longest as usize
    }
}
