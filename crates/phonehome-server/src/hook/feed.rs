//! Where a printer reads a build's log: the store of this process, or a standing server.

use std::io;

use crate::{
    BuildLog, LogItem, LogRecord,
    client::remote_log::{Item, RemoteLog},
};

/// A cursor over a build's log.
#[derive(Debug)]
pub(crate) enum Feed {
    Store(Box<BuildLog>),
    Remote(RemoteLog),
}

impl Feed {
    /// The next item; `None` when the build has its verdict and everything was read. Cancel safe.
    pub(super) async fn next(&mut self) -> io::Result<Option<Item>> {
        match self {
            Self::Store(log) => Ok(log.next().await?.map(Item::from)),
            Self::Remote(log) => log.next().await,
        }
    }

    /// The next item, if there is one at this moment.
    pub(super) fn try_next(&mut self) -> io::Result<Option<Item>> {
        match self {
            Self::Store(log) => Ok(log.try_next()?.map(Item::from)),
            Self::Remote(log) => log.try_next(),
        }
    }
}

impl From<LogItem> for Item {
    fn from(item: LogItem) -> Self {
        match item {
            LogItem::Lost { step, records, .. } => Self::Lost { step, records },
            LogItem::Record(LogRecord { step, attempt, record }) => {
                Self::Record { step, attempt, stream: record.stream, payload: record.payload }
            }
        }
    }
}
