//! Writing to descriptors that somebody else opened.

use std::{io, os::fd::BorrowedFd};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

/// Writes all of `block`, also to a descriptor that somebody else made non-blocking. Blocks as long as its reader does.
///
/// # Errors
///
/// When the descriptor takes no more, because its reader is gone say.
pub fn write_all(descriptor: BorrowedFd<'_>, mut block: &[u8]) -> io::Result<()> {
    while !block.is_empty() {
        match rustix::io::write(descriptor, block) {
            Ok(count) => block = &block[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                poll(&mut [PollFd::from_borrowed_fd(descriptor, PollFlags::OUT)], None)?;
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}
