//! Breadth first through every state, so that what is found first is shortest.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    fmt,
};

use crate::{
    rules::{Broken, Seen},
    world::{Action, Model, World},
};

/// What an exhaustive search has been through.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) states: usize,
    pub(crate) transitions: usize,
    pub(crate) ends: usize,
    /// Actions to the state that is furthest away.
    pub(crate) depth: usize,
    pub(crate) seen: Seen,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, ends, depth, seen } = self;
        write!(f, "{states} states, {transitions} transitions, {ends} ends, at most {depth} actions away\n{seen}")
    }
}

/// The shortest way to something that must never be.
pub(crate) struct Counterexample {
    pub(crate) broken: Broken,
    pub(crate) trace: Vec<Action>,
}

impl fmt::Debug for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:?} after {} actions:", self.broken, self.trace.len())?;
        self.trace.iter().try_for_each(|action| writeln!(f, "  {action:?}"))
    }
}

/// Goes through every state of `model`. In each one the invariants hold; where nothing more can happen, everybody has
/// come to a good end; and since nothing can happen for ever without a fault, everybody always does.
pub(crate) fn search(model: &Model) -> Result<Report, Counterexample> {
    Search::new(model).run()
}

/// The same, and shows that the fingerprint hides nothing: states that agree in it are the same to the state machines.
pub(crate) fn search_twice_over(model: &Model) -> Result<Report, Counterexample> {
    Search { words: Some(Vec::new()), ..Search::new(model) }.run()
}

struct Search<'a> {
    model: &'a Model,
    /// Fingerprints of the states, and their numbers.
    numbers: HashMap<Fingerprint, u32>,
    /// How each state was reached first: from which, by what.
    origins: Vec<(u32, Action)>,
    /// States still to be gone on from.
    frontier: VecDeque<(u32, World)>,
    /// From state to state, without a fault.
    steps: Vec<(u32, u32)>,
    transitions: usize,
    ends: usize,
    seen: Seen,
    scratch: Vec<u8>,
    /// Every state in the state machines' own words, where that is to be compared.
    words: Option<Vec<String>>,
}

/// Half of a BLAKE3 digest: two of a hundred million states agree in it with a probability of 10^-22.
type Fingerprint = u128;

impl<'a> Search<'a> {
    fn new(model: &'a Model) -> Self {
        Self {
            model,
            numbers: HashMap::new(),
            origins: Vec::new(),
            frontier: VecDeque::new(),
            steps: Vec::new(),
            transitions: 0,
            ends: 0,
            seen: Seen::default(),
            scratch: Vec::new(),
            words: None,
        }
    }

    fn run(mut self) -> Result<Report, Counterexample> {
        self.number(World::new(self.model), 0, Action::Commit)
            .map_err(|broken| self.counterexample(broken, 0, None))?;
        while let Some((at, world)) = self.frontier.pop_front() {
            self.expand(at, &world)?;
        }
        if let Some(at) = self.livelock() {
            return Err(self.counterexample(Broken::Livelock, at, None));
        }
        let (states, depth) = (self.origins.len(), self.trace(self.origins.len() as u32 - 1).len());
        Ok(Report { states, transitions: self.transitions, ends: self.ends, depth, seen: self.seen })
    }

    fn expand(&mut self, at: u32, world: &World) -> Result<(), Counterexample> {
        let mut possible = Vec::new();
        for action in world.actions(self.model) {
            let broken = |search: &Self, broken| search.counterexample(broken, at, Some(action));
            let next = world.after(action, self.model, &mut self.seen).map_err(|what| broken(self, what))?;
            let Some(next) = next else { continue };
            let to = self.number(next, at, action).map_err(|what| broken(self, what))?;
            self.transitions += 1;
            if !action.is_optional() {
                possible.push(action);
                self.steps.push((at, to));
            }
        }
        self.ends += usize::from(possible.is_empty());
        let is_good = !possible.is_empty() || world.is_settled(self.model);
        if !is_good || world.waits_for_others(&possible) {
            return Err(self.counterexample(Broken::DeadEnd, at, None));
        }
        Ok(())
    }

    /// The state's number. A new state is checked and gone on from.
    fn number(&mut self, world: World, from: u32, by: Action) -> Result<u32, Broken> {
        let fingerprint = self.fingerprint(&world);
        let number = self.origins.len() as u32;
        match self.numbers.entry(fingerprint) {
            Entry::Occupied(known) => {
                if let Some(words) = &self.words {
                    assert_eq!(words[*known.get() as usize], world.in_own_words(), "one fingerprint, two states");
                }
                Ok(*known.get())
            }
            Entry::Vacant(new) => {
                world.check(self.model)?;
                new.insert(number);
                if let Some(words) = &mut self.words {
                    words.push(world.in_own_words());
                }
                self.origins.push((from, by));
                self.frontier.push_back((number, world));
                Ok(number)
            }
        }
    }

    fn fingerprint(&mut self, world: &World) -> Fingerprint {
        self.scratch.clear();
        world.encode(self.model, &mut self.scratch);
        let mut half = [0; 16];
        half.copy_from_slice(&blake3::hash(&self.scratch).as_bytes()[..16]);
        Fingerprint::from_le_bytes(half)
    }

    /// A state that the steps without a fault lead back to, or that follows such a one: one that is left when states
    /// without a step to them are taken away, again and again.
    fn livelock(&self) -> Option<u32> {
        let mut arrivals = vec![0_u32; self.origins.len()];
        self.steps.iter().for_each(|(_, to)| arrivals[*to as usize] += 1);
        let mut free: Vec<u32> = (0..self.origins.len() as u32).filter(|at| arrivals[*at as usize] == 0).collect();
        while let Some(at) = free.pop() {
            // A state is expanded once and in the order of the numbers, so its steps lie together.
            let first = self.steps.partition_point(|(from, _)| *from < at);
            for (_, to) in self.steps[first..].iter().take_while(|(from, _)| *from == at) {
                arrivals[*to as usize] -= 1;
                if arrivals[*to as usize] == 0 {
                    free.push(*to);
                }
            }
        }
        arrivals.iter().position(|count| *count > 0).map(|at| at as u32)
    }

    fn counterexample(&self, broken: Broken, at: u32, last: Option<Action>) -> Counterexample {
        let mut trace = self.trace(at);
        trace.extend(last);
        Counterexample { broken, trace }
    }

    fn trace(&self, mut at: u32) -> Vec<Action> {
        let mut trace = Vec::new();
        while at > 0 {
            let (from, action) = self.origins[at as usize];
            trace.push(action);
            at = from;
        }
        trace.reverse();
        trace
    }
}
