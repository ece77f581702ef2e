//! An index over all builds, running and ended, for the questions that directories answer slowly.
//!
//! The files of the builds are the truth: the catalogue can be deleted at any time and is made again from them, so it
//! need not survive a crash of the machine with its latest changes. It is an SQLite database in the data directory.

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use phonehome_proto::{frame::UnixMicros, id::BuildId};
use rusqlite::{Connection, OptionalExtension, params, params_from_iter, types::Value};

use crate::{builds::TokenHash, retention::Ended, summary::Summary};

/// The catalogue of one data directory. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Catalogue(Arc<Mutex<Connection>>);

/// What the catalogue has of a build beside its summary.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) summary: Summary,
    pub(crate) created: UnixMicros,
    pub(crate) ended: Option<UnixMicros>,
    pub(crate) token: TokenHash,
    /// Bytes on the disk, once it has ended.
    pub(crate) stored: u64,
}

/// Which builds to list.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filter {
    /// All of these, by key and perhaps value.
    pub(crate) labels: Vec<(String, Option<String>)>,
    /// Any of these; `running` is one without a verdict.
    pub(crate) verdicts: Vec<String>,
    /// Created then or later.
    pub(crate) since: Option<UnixMicros>,
    /// Created before.
    pub(crate) until: Option<UnixMicros>,
    /// Behind this one, in the order of the list.
    pub(crate) after: Option<(UnixMicros, String)>,
    pub(crate) limit: usize,
}

/// A part of the list, the newest first.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) summaries: Vec<Summary>,
    /// Where the next part begins; `None` when this was the last.
    pub(crate) next: Option<(UnixMicros, String)>,
}

/// The name of the database in the data directory.
pub(crate) const FILE: &str = "catalogue.db";

/// Raised with every change of the tables: an older database is made again.
const VERSION: i64 = 2;

/// Removals that are remembered.
const REMEMBERED: i64 = 10_000;

const SCHEMA: &str = "
    CREATE TABLE builds (
        id TEXT PRIMARY KEY, created INTEGER NOT NULL, ended INTEGER, verdict TEXT, sealed INTEGER NOT NULL,
        stored INTEGER NOT NULL, token BLOB NOT NULL, summary TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX builds_by_time ON builds (created DESC, id DESC);
    CREATE INDEX builds_by_end ON builds (ended) WHERE ended IS NOT NULL;
    CREATE INDEX builds_to_seal ON builds (ended) WHERE ended IS NOT NULL AND NOT sealed;
    CREATE INDEX builds_by_verdict ON builds (verdict, created DESC);
    CREATE INDEX builds_by_token ON builds (token);
    CREATE TABLE labels (
        build TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE, key TEXT NOT NULL, value TEXT NOT NULL,
        PRIMARY KEY (build, key)
    ) WITHOUT ROWID;
    CREATE INDEX labels_by_key ON labels (key, value, build);
    CREATE TABLE expired (id TEXT PRIMARY KEY, at INTEGER NOT NULL, why TEXT NOT NULL) WITHOUT ROWID;
    CREATE INDEX expired_by_time ON expired (at);
";

impl Catalogue {
    /// Opens the catalogue of a data directory; one that is missing, damaged or of another version is begun anew, empty.
    pub(crate) fn open(data: &Path) -> io::Result<Self> {
        let path = data.join(FILE);
        if let Some(connection) = Self::reopen(&path) {
            return Ok(Self(Arc::new(Mutex::new(connection))));
        }
        discard(data)?;
        let connection = connect(&path).map_err(io::Error::other)?;
        let made =
            connection.execute_batch(SCHEMA).and_then(|()| connection.pragma_update(None, "user_version", VERSION));
        made.map_err(io::Error::other)?;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    fn reopen(path: &Path) -> Option<Connection> {
        if !path.exists() {
            return None;
        }
        let connection = connect(path).ok()?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).ok()?;
        let sound: String = connection.pragma_query_value(None, "quick_check", |row| row.get(0)).ok()?;
        (version == VERSION && sound == "ok").then_some(connection)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> io::Result<T> {
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)).map_err(io::Error::other)
    }

    /// Adds a build, or replaces what is known of it.
    pub(crate) fn put(&self, entry: &Entry) -> io::Result<()> {
        let summary = serde_json::to_string(&entry.summary).map_err(io::Error::other)?;
        let Entry { summary: Summary { id, verdict, sealed, labels, .. }, created, ended, token, stored } = entry;
        self.with(|connection| {
            let transaction = connection.transaction()?;
            transaction.execute("DELETE FROM builds WHERE id = ?1", [id.as_str()])?;
            transaction.execute(
                "INSERT INTO builds VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                params![
                    id.as_str(),
                    *created as i64,
                    ended.map(|ended| ended as i64),
                    verdict,
                    sealed,
                    *stored as i64,
                    token.0.as_slice(),
                    summary
                ],
            )?;
            for (key, value) in labels {
                transaction.execute("INSERT INTO labels VALUES (?1, ?2, ?3)", params![id.as_str(), key, value])?;
            }
            transaction.commit()
        })
    }

    pub(crate) fn remove(&self, id: &str) -> io::Result<()> {
        self.with(|connection| connection.execute("DELETE FROM builds WHERE id = ?1", [id])).map(drop)
    }

    /// Takes a build out and remembers why, for whoever asks for it later. Of the oldest removals nothing is remembered.
    pub(crate) fn expire(&self, id: &BuildId, why: &str, now: UnixMicros) -> io::Result<()> {
        self.with(|connection| {
            let transaction = connection.transaction()?;
            transaction.execute("DELETE FROM builds WHERE id = ?1", [id.as_str()])?;
            transaction
                .execute("INSERT OR REPLACE INTO expired VALUES (?1, ?2, ?3)", params![id.as_str(), now as i64, why])?;
            transaction.execute(
                "DELETE FROM expired WHERE id IN (SELECT id FROM expired ORDER BY at DESC LIMIT -1 OFFSET ?1)",
                [REMEMBERED],
            )?;
            transaction.commit()
        })
    }

    /// When and why a build was removed.
    pub(crate) fn expired(&self, id: &BuildId) -> io::Result<Option<(UnixMicros, String)>> {
        self.with(|connection| {
            let row = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(0)? as u64, row.get(1)?));
            connection.query_row("SELECT at, why FROM expired WHERE id = ?1", [id.as_str()], row).optional()
        })
    }

    /// The build a token is for.
    pub(crate) fn by_token(&self, token: &TokenHash) -> io::Result<Option<BuildId>> {
        let found: Option<String> = self.with(|connection| {
            connection
                .query_row("SELECT id FROM builds WHERE token = ?1", [token.0.as_slice()], |row| row.get(0))
                .optional()
        })?;
        Ok(found.and_then(|id| id.parse().ok()))
    }

    /// The ids of all builds; with whether they have ended.
    pub(crate) fn ids(&self) -> io::Result<BTreeSet<(String, bool)>> {
        self.with(|connection| {
            let mut query = connection.prepare("SELECT id, ended IS NOT NULL FROM builds")?;
            query.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })
    }

    /// Ended builds, the first to end first.
    pub(crate) fn ended(&self) -> io::Result<Vec<Ended>> {
        self.select_ended("ended IS NOT NULL", UnixMicros::MAX)
    }

    /// Those that are not sealed and ended before `before`: there is an index for just this question.
    pub(crate) fn unsealed(&self, before: UnixMicros) -> io::Result<Vec<Ended>> {
        self.select_ended("ended IS NOT NULL AND NOT sealed", before)
    }

    fn select_ended(&self, condition: &str, before: UnixMicros) -> io::Result<Vec<Ended>> {
        let before = i64::try_from(before).unwrap_or(i64::MAX);
        self.with(|connection| {
            let mut query = connection.prepare(&format!(
                "SELECT id, ended, stored FROM builds WHERE {condition} AND ended < ?1 ORDER BY ended, id"
            ))?;
            let rows = query.query_map([before], |row| {
                Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
            })?;
            let mut found = Vec::new();
            for row in rows {
                let (id, ended, stored) = row?;
                if let Ok(id) = id.parse() {
                    found.push(Ended { id, ended: ended as u64, bytes: stored as u64 });
                }
            }
            Ok(found)
        })
    }

    /// The builds that a filter lets through.
    pub(crate) fn list(&self, filter: &Filter) -> io::Result<Page> {
        let (conditions, values) = conditions(filter);
        let sql = format!(
            "SELECT created, id, summary FROM builds WHERE {conditions} ORDER BY created DESC, id DESC LIMIT {}",
            filter.limit + 1
        );
        let mut rows: Vec<(i64, String, String)> = self.with(|connection| {
            let mut query = connection.prepare(&sql)?;
            query.query_map(params_from_iter(values), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?.collect()
        })?;
        let has_more = rows.len() > filter.limit;
        rows.truncate(filter.limit);
        let next = rows.last().filter(|_| has_more).map(|(created, id, _)| (*created as u64, id.clone()));
        let summaries = rows.iter().map(|(.., text)| serde_json::from_str(text)).collect::<Result<_, _>>()?;
        Ok(Page { summaries, next })
    }
}

/// Removes the catalogue of a data directory.
pub(crate) fn discard(data: &Path) -> io::Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        match std::fs::remove_file(data.join(format!("{FILE}{suffix}"))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// The WHERE clause of a filter and its values.
fn conditions(filter: &Filter) -> (String, Vec<Value>) {
    let (mut all, mut values) = (vec!["1".to_owned()], Vec::new());
    for (key, value) in &filter.labels {
        values.push(Value::from(key.clone()));
        let matching = value.as_ref().map_or("", |value| {
            values.push(Value::from(value.clone()));
            " AND value = ?"
        });
        all.push(format!("id IN (SELECT build FROM labels WHERE key = ?{matching})"));
    }
    if !filter.verdicts.is_empty() {
        let any = filter.verdicts.iter().map(|verdict| {
            if verdict == "running" {
                return "verdict IS NULL";
            }
            values.push(Value::from(verdict.clone()));
            "verdict = ?"
        });
        all.push(format!("({})", any.collect::<Vec<_>>().join(" OR ")));
    }
    for (bound, condition) in [(filter.since, "created >= ?"), (filter.until, "created < ?")] {
        if let Some(bound) = bound {
            values.push(Value::from(i64::try_from(bound).unwrap_or(i64::MAX)));
            all.push(condition.to_owned());
        }
    }
    if let Some((created, id)) = &filter.after {
        values.extend([Value::from(i64::try_from(*created).unwrap_or(i64::MAX)), Value::from(id.clone())]);
        all.push("(created, id) < (?, ?)".to_owned());
    }
    (all.join(" AND "), values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builds::hash_token;

    #[test]
    fn pages_hold_every_build_once_the_newest_first() {
        let (_dir, catalogue) = scene();
        for at in 0..25 {
            put(&catalogue, &format!("b{at}"), at / 2, Some("succeeded"), &[]);
        }
        let mut filter = Filter { limit: 7, ..Filter::default() };
        let mut seen = Vec::new();
        loop {
            let page = catalogue.list(&filter).unwrap();
            seen.extend(page.summaries.into_iter().map(|summary| summary.id.to_string()));
            match page.next {
                Some(next) => filter.after = Some(next),
                None => break,
            }
        }
        assert_eq!((seen.len(), seen.iter().collect::<BTreeSet<_>>().len()), (25, 25));
        assert_eq!((seen[0].as_str(), seen[24].as_str()), ("b24", "b0"));
    }

    #[test]
    fn filters_are_met_together() {
        let (_dir, catalogue) = scene();
        put(&catalogue, "one", 1, Some("failed"), &[("app", "shop"), ("team", "a")]);
        put(&catalogue, "two", 2, None, &[("app", "shop")]);
        put(&catalogue, "three", 3, Some("failed"), &[("app", "it's")]);
        let label = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        for (filter, expected) in [
            (Filter { labels: vec![label("app", Some("shop"))], ..Filter::default() }, &["two", "one"][..]),
            (Filter { labels: vec![label("app", None), label("team", None)], ..Filter::default() }, &["one"]),
            (Filter { labels: vec![label("app", Some("it's"))], ..Filter::default() }, &["three"]),
            (Filter { verdicts: vec!["failed".into()], ..Filter::default() }, &["three", "one"]),
            (Filter { verdicts: vec!["running".into(), "lost".into()], ..Filter::default() }, &["two"]),
            (Filter { since: Some(2), until: Some(3), ..Filter::default() }, &["two"]),
            (Filter { since: Some(u64::MAX), ..Filter::default() }, &[]),
        ] {
            let page = catalogue.list(&Filter { limit: 10, ..filter.clone() }).unwrap();
            let ids: Vec<_> = page.summaries.iter().map(|summary| summary.id.as_str().to_owned()).collect();
            assert_eq!(ids, expected, "{filter:?}");
        }
    }

    #[test]
    fn what_is_put_again_replaces_what_was_there() {
        let (_dir, catalogue) = scene();
        put(&catalogue, "b", 1, None, &[("old", "1")]);
        put(&catalogue, "b", 1, Some("lost"), &[("new", "2")]);
        let filter = Filter { labels: vec![("old".into(), None)], limit: 9, ..Filter::default() };
        assert!(catalogue.list(&filter).unwrap().summaries.is_empty());
        assert_eq!(catalogue.ids().unwrap(), BTreeSet::from([("b".to_owned(), true)]));
        assert_eq!(catalogue.by_token(&hash_token("b")).unwrap().unwrap().as_str(), "b");
        assert_eq!(catalogue.ended().unwrap().len(), 1);
        assert_eq!([1, 2].map(|before| catalogue.unsealed(before).unwrap().len()), [0, 1], "it ended at 1");
        catalogue.remove("b").unwrap();
        assert!(catalogue.ids().unwrap().is_empty() && catalogue.by_token(&hash_token("b")).unwrap().is_none());
    }

    #[test]
    fn unsealed_builds_are_found_without_a_look_at_the_others() {
        let (_dir, catalogue) = scene();
        let plan: String = catalogue
            .with(|connection| {
                let sql = "EXPLAIN QUERY PLAN SELECT id, ended, stored FROM builds
                    WHERE ended IS NOT NULL AND NOT sealed AND ended < ?1 ORDER BY ended, id";
                connection.query_row(sql, [1], |row| row.get("detail"))
            })
            .unwrap();
        assert!(plan.contains("builds_to_seal"), "{plan}");
    }

    #[test]
    fn what_was_removed_is_remembered_for_a_while() {
        let (_dir, catalogue) = scene();
        put(&catalogue, "b", 1, Some("lost"), &[("app", "x")]);
        catalogue.expire(&"b".parse().unwrap(), "age", 7).unwrap();
        assert!(catalogue.ids().unwrap().is_empty());
        assert_eq!(catalogue.expired(&"b".parse().unwrap()).unwrap(), Some((7, "age".to_owned())));
        assert_eq!(catalogue.expired(&"c".parse().unwrap()).unwrap(), None);
    }

    #[test]
    fn a_damaged_catalogue_is_begun_anew_and_a_good_one_is_kept() {
        let (dir, catalogue) = scene();
        put(&catalogue, "b", 1, None, &[]);
        drop(catalogue);
        assert_eq!(Catalogue::open(dir.path()).unwrap().ids().unwrap().len(), 1);
        std::fs::write(dir.path().join(FILE), "this is no database, and long enough to be sure of it".repeat(99))
            .unwrap();
        assert!(Catalogue::open(dir.path()).unwrap().ids().unwrap().is_empty());
    }

    fn scene() -> (tempfile::TempDir, Catalogue) {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(dir.path()).unwrap();
        (dir, catalogue)
    }

    fn put(catalogue: &Catalogue, id: &str, created: u64, verdict: Option<&str>, labels: &[(&str, &str)]) {
        let mut summary = Summary::example(id);
        summary.verdict = verdict.map(str::to_owned);
        summary.labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let ended = verdict.map(|_| created);
        catalogue.put(&Entry { summary, created, ended, token: hash_token(id), stored: 1 }).unwrap();
    }
}
