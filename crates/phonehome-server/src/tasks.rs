//! The tasks of one server.

use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Every task of a server. They end by themselves when it shuts down, or all at once where they stand.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(self.until_stopped(task));
    }

    /// Starts a task that nobody waits for: it ends when it has nothing more to do, or with all others.
    pub(crate) fn spawn_aside(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(tokio::spawn(self.until_stopped(task)));
    }

    fn until_stopped(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        // In a box: a future that is handed to another has its place in both, and there are ten thousand of them.
        let (stop, task) = (self.stop.clone(), Box::pin(task));
        async move {
            stop.run_until_cancelled(task).await;
        }
    }

    /// Waits until every task has ended.
    pub(crate) async fn ended(&self) {
        self.tracker.close();
        self.tracker.wait().await;
    }

    /// Ends every task at the point it has got to.
    pub(crate) fn stop(&self) {
        self.stop.cancel();
    }
}
