//! Who has to be there before a command is started, and who has to stay: pure rules over what is seen.
//!
//! No times are compared: the clock of a machine may jump. A tombstone with `Died` is a death, whenever that was, until
//! its owner is born again and carves a new one.

use super::{
    graveyard::list,
    lookout::{Seen, View},
    tombstone::Tombstone,
};
use crate::config::{BirthDep, SiblingName, Stage};

/// Something that a command waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Missing {
    /// What has to happen, for people: `db to be born`.
    pub(crate) what: String,
    /// Why it has not, as far as can be known.
    pub(crate) why: String,
}

/// The death of a sibling.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Death {
    pub(crate) name: SiblingName,
    pub(crate) tombstone: Tombstone,
}

/// The births that have not happened, in the order in which they were asked for.
pub(crate) fn missing_births(deps: &[BirthDep], view: &View) -> Vec<Missing> {
    deps.iter().filter_map(|dep| missing(dep, view)).collect()
}

fn missing(dep: &BirthDep, view: &View) -> Option<Missing> {
    let why = match view.stones.get(&dep.name) {
        None => no_tombstone(&view.present),
        Some(Seen::Garbage(why)) => format!("what lies under its name is no tombstone: {why}"),
        Some(Seen::Stale) => "its tombstone is of another generation".into(),
        Some(Seen::Tombstone(stone)) => lacks(dep.stage, stone)?,
    };
    Some(Missing { what: dep.to_string(), why })
}

/// What a tombstone lacks. Whoever has died is as good as unborn: nobody can lean on it.
fn lacks(stage: Stage, stone: &Tombstone) -> Option<String> {
    if let Some(died) = &stone.died {
        return Some(format!("it died at {died}{}", with_code(stone)));
    }
    match stage {
        Stage::Born => stone.born.is_none().then(|| "its tombstone has no Born yet".into()),
        Stage::Ready => stone.ready.is_none().then(|| "its tombstone has no Ready yet".into()),
    }
}

fn no_tombstone(present: &[String]) -> String {
    if present.is_empty() {
        "no tombstone, and none of anybody else".into()
    } else {
        format!("no tombstone; there are: {}", list(present))
    }
}

/// The first of these that has died.
pub(crate) fn first_death(deps: &[SiblingName], view: &View) -> Option<Death> {
    deps.iter().find_map(|name| match view.stones.get(name)? {
        Seen::Tombstone(stone) => stone.died.is_some().then(|| Death { name: name.clone(), tombstone: stone.clone() }),
        Seen::Stale | Seen::Garbage(_) => None,
    })
}

impl std::fmt::Display for Death {
    /// Why whoever depends on it is ended: `main has died with exit code 3`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has died{}", self.name, with_code(&self.tombstone))
    }
}

fn with_code(stone: &Tombstone) -> String {
    stone.exit_code.map(|code| format!(" with exit code {code}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_birth_is_missed_until_its_stage_is_reached_by_someone_alive() {
        let why = |dep: &str, stone: &str| {
            let missing = missing_births(&[dep.parse().unwrap()], &view(&[("db", stone)]));
            missing.first().map(|missing| missing.why.clone())
        };
        assert_eq!(why("db", BORN), None);
        assert_eq!(why("db:ready", BORN).unwrap(), "its tombstone has no Ready yet");
        assert_eq!(why("db:ready", &format!("{BORN}Ready: 2026-11-21T08:58:44Z\n")), None);
        assert_eq!(why("db", "").unwrap(), "its tombstone has no Born yet");
        let died = format!("{BORN}Ready: 2026-11-21T08:58:44Z\nDied: 2026-11-21T08:58:45Z\nExitCode: 3\n");
        for dep in ["db", "db:ready"] {
            assert_eq!(why(dep, &died).unwrap(), "it died at 2026-11-21T08:58:45Z with exit code 3");
        }
    }

    #[test]
    fn an_unknown_name_is_told_with_those_that_are_known() {
        let deps = ["db".parse().unwrap(), "web:ready".parse().unwrap()];
        let view = View { present: vec!["proxy".into(), "web".into()], ..view(&[("web", BORN)]) };
        let missing = missing_births(&deps, &view);
        assert_eq!(list(missing.iter().map(|missing| &missing.what)), "db to be born, web to be ready");
        assert_eq!(missing[0].why, "no tombstone; there are: proxy, web");
        assert_eq!(missing_births(&deps, &View::default())[0].why, "no tombstone, and none of anybody else");
    }

    #[test]
    fn a_death_counts_whenever_it_was_and_a_rebirth_ends_it() {
        let deps = ["web".parse().unwrap(), "db".parse().unwrap()];
        // A clock that jumped back between them: a death all the same.
        let died = "Born: 2026-11-21T08:58:44Z\nDied: 2026-11-20T00:00:00Z\nExitCode: 0\n";
        let death = first_death(&deps, &view(&[("web", BORN), ("db", died)])).unwrap();
        assert_eq!(death.to_string(), "db has died with exit code 0");
        assert_eq!(first_death(&deps, &view(&[("web", BORN), ("db", BORN), ("other", died)])), None);
        let mut stale = view(&[]);
        stale.stones.insert("db".parse().unwrap(), Seen::Stale);
        stale.stones.insert("web".parse().unwrap(), Seen::Garbage("noise".into()));
        assert_eq!(first_death(&deps, &stale), None);
    }

    const BORN: &str = "Born: 2026-11-21T08:58:43Z\n";

    fn view(stones: &[(&str, &str)]) -> View {
        let seen = |text: &str| Seen::Tombstone(Tombstone::parse(text.as_bytes()).unwrap());
        let stones = stones.iter().map(|(name, text)| (name.parse().unwrap(), seen(text))).collect();
        View { is_real: true, stones, present: Vec::new() }
    }
}
