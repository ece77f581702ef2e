//! Small buffers for sockets that wait, and few reads for those that do not.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A stream whose reader has a small buffer. When that was filled, more is there to be read: the next read takes a lot,
/// into a buffer that is gone when it is empty.
#[derive(Debug)]
pub(crate) struct Burst<S> {
    inner: S,
    /// Whether the last read got as much as there was room for.
    is_busy: bool,
    held: Vec<u8>,
    /// How much of `held` the reader has.
    taken: usize,
}

/// What a busy stream is asked for at a time, bytes: a full record.
const BURST: usize = 64 * 1024;

impl<S> Burst<S> {
    pub(crate) fn new(inner: S) -> Self {
        Self { inner, is_busy: false, held: Vec::new(), taken: 0 }
    }

    /// Hands over what is held.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let rest = &self.held[self.taken..];
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(&rest[..count]);
        self.taken += count;
        if self.taken == self.held.len() {
            (self.held, self.taken) = (Vec::new(), 0);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Burst<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.held.is_empty() {
            if !this.is_busy {
                ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
                this.is_busy = buffer.remaining() == 0;
                return Poll::Ready(Ok(()));
            }
            this.is_busy = false; // unless there is more
            let mut space = vec![0; BURST];
            let mut burst = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut burst))?;
            let count = burst.filled().len();
            this.is_busy = count >= buffer.remaining();
            space.truncate(count);
            this.held = space;
        }
        this.give(buffer);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Burst<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_block_takes_few_reads_and_nothing_is_kept_of_it() {
        let block: Vec<u8> = (0..3 * BURST).map(|at| (at % 251) as u8).collect();
        let mut burst = Burst::new(Counted { rest: &block, reads: 0 });
        let (mut seen, mut small) = (Vec::new(), [0; 1000]);
        loop {
            match burst.read(&mut small).await.unwrap() {
                0 => break,
                count => seen.extend_from_slice(&small[..count]),
            }
        }
        assert!(seen == block && burst.inner.reads < 8, "{}", burst.inner.reads);
        assert_eq!(burst.held.capacity(), 0);
    }

    #[tokio::test]
    async fn what_comes_line_by_line_is_read_line_by_line() {
        let (mut far, near) = tokio::io::duplex(64);
        let (mut near, mut small) = (Burst::new(near), [0; 8]);
        for line in ["one", "two", "a longer line than the buffer"] {
            far.write_all(line.as_bytes()).await.unwrap();
            let mut seen = Vec::new();
            while seen.len() < line.len() {
                let count = near.read(&mut small).await.unwrap();
                seen.extend_from_slice(&small[..count]);
            }
            assert_eq!(seen, line.as_bytes());
        }
        drop(far);
        assert_eq!(near.read(&mut small).await.unwrap(), 0);
    }

    struct Counted<'a> {
        rest: &'a [u8],
        reads: usize,
    }

    impl AsyncRead for Counted<'_> {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.reads += 1;
            Pin::new(&mut self.rest).poll_read(cx, buffer)
        }
    }
}
